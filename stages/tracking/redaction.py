"""Text without passwords and tokens, for everything that a run records or says."""

import contextlib
import os
import re
import sys
import textwrap
from pathlib import Path

SHORTEST_SECRET = 8  # a shorter value of a variable is too likely a word of the text

_URI_SECRET = re.compile(r"(?<=://)[^/\s'\"]*@")  # user:password@, up to the last @ before the path
_QUERY_SECRET = re.compile(r"(?i)\b(password|secret|token|access_token|api_?key|sig|signature)=[^&\s'\"]+")
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")
_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|api_?key|access_key|credential|auth_token)")
_SECRET_VARIABLE = re.compile(r"(?i)(token|secret|passw|passphrase|credential|(^|_)(api_?)?(key|pass|auth)(_|$))")
_URI_PASSWORD = re.compile(r"://[^/\s:]*:([^/\s]+)@")


def redacted(text):
    """The text without passwords and tokens: those of the environment, and what URIs and settings may carry."""
    text = str(text)
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, "***")
    text = _URI_SECRET.sub("***@", text)
    return _TOKEN.sub(r"\1***", _QUERY_SECRET.sub(r"\1=***", text))


def is_secret(variable: str) -> bool:
    """Has this variable a secret's name?"""
    return bool(_SECRET_VARIABLE.search(variable))


def holds_secret(text: str) -> bool:
    """Is a secret of the environment in it, a known kind of token, or a password in a URI?"""
    passwords = [found for found in _URI_PASSWORD.findall(text) if "$" not in found]  # a variable of a shell is a name
    return bool(passwords or _TOKEN.search(text) or any(secret in text for secret in _secrets_of_the_environment()))


def _secrets_of_the_environment():
    """Values of variables with a secret's name, and passwords in the URIs of any variable; longest first."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    values.update(*(_URI_PASSWORD.findall(value) for value in os.environ.values()))
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def redacted_line(text, most):
    """Redacted, on one line and cut between words to this many characters; redacted first, or half a secret stays."""
    return textwrap.shorten(redacted(text), most, placeholder=" …", break_on_hyphens=False)


def redacted_within(value):
    """The value with every string in it redacted, keys left alone."""
    if isinstance(value, dict):
        return {key: redacted_within(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_within(inner) for inner in value]
    return redacted(value) if isinstance(value, (str, Path)) else value


def copy_redacted(source, target):
    content = Path(source).read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        content = redacted(content.decode()).encode()
    Path(target).write_bytes(content)


def flat(values, prefix=""):
    """Nested settings as dotted keys, the form in which MLflow compares runs; a secret's value is hidden."""
    if not isinstance(values, dict):
        name = prefix.rstrip(".")
        return {name: "***" if _SECRET_KEY.search(name.rsplit(".", 1)[-1]) and values else values}
    parts = [flat(inner, f"{prefix}{name}.") for name, inner in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def plain(settings):
    """Settings as YAML can write them, secrets hidden."""
    if isinstance(settings, dict):
        return {str(key): "***" if _SECRET_KEY.search(str(key)) and isinstance(value, str) else plain(value)
                for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value) for value in settings]
    return settings if isinstance(settings, (bool, int, float, type(None))) else str(settings)


def say(message):
    """A line on stderr; nothing where stderr is closed."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"offramp: {redacted(message)}", file=sys.stderr, flush=True)
