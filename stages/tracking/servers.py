"""Which MLflow a record goes to, and, when it does not get there, one line on why and what to do about it."""

import contextlib
import os
import re
import socket
import urllib.parse
import urllib.request

from stages.files.artifacts import Refusal
from stages.tracking.redaction import redacted_line

CONNECT_S = 2.0  # a server that does not take a connection in this time is down
LONGEST_REASON = 300  # characters; the remedy comes after it


def tracking_uri(root):
    """MLFLOW_TRACKING_URI, or SQLite in the checkout; a relative SQLite path starts at the root."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{(root / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def require_connection(uri):
    """Fail within seconds, before MLflow is imported, where the URI is none or nothing listens."""
    _refuse_unless_uri(uri)
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxy = _proxy(uri)
    if proxy:
        parts = urllib.parse.urlsplit(os.environ[proxy])
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()


def _refuse_unless_uri(uri):
    """MLflow takes what has no scheme for a folder, and complains of folders."""
    shown = f"MLFLOW_TRACKING_URI={re.sub(r'^[^/]*@', '***@', uri)}"
    if re.fullmatch(r"([^/@]*@)?([\w.-]+|\[[\da-fA-F:]+\]):\d+(/.*)?", uri):
        raise Refusal(f"{shown} has no scheme: write http://{shown.partition('=')[2]}")
    folder = uri.startswith("file:") or "://" not in uri and not re.match(r"(databricks|uc)\b", uri)
    if folder and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        cure = "set MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or a server's address such as http://127.0.0.1:5000"
        raise Refusal(f"{shown} names a folder, and MLflow keeps runs in folders no longer: {cure}")


def _proxy(uri):
    """The variable of the environment that sends requests for this server to a proxy, if one does."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    names = [name for scheme in (parts.scheme, "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]
    return next((name for name in names if os.environ.get(name)), None)


def complaint(error, uri):
    """What the person reads when nothing could be sent to this MLflow: what is wrong, and what to do about it."""
    if isinstance(error, Refusal):
        return str(error)
    status = _http_status(error)
    if status == 401:
        cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"MLflow at {uri} refused the user name or password: {cure}"
    if status == 403:
        return f"MLflow at {uri} does not let this user write there (403): ask who runs it for the permission"
    proxy = _proxy(uri)
    if proxy:
        host = urllib.parse.urlsplit(uri).hostname
        cure = f"if {host} is to be reached without a proxy, set NO_PROXY={host}"
        through = f"through the proxy that {proxy} names, {os.environ[proxy]}"
        return f"MLflow at {uri} was not reached {through} ({reason(error)}): {cure}"
    return f"MLflow at {uri} was not reached ({reason(error)})"


def reason(error):
    return f"{type(error).__name__}: {redacted_line(str(error) or 'no message', LONGEST_REASON)}"


def _http_status(error):
    """MLflow's exceptions know the status of the answer, or only write it."""
    found = re.search(r"failed with error code (\d{3})", str(error))
    if found:
        return int(found[1])
    with contextlib.suppress(AttributeError):
        return error.get_http_status_code()
    return None
