"""Where the files of a corpus are: the sources of the standard library, and what corpus.paths names."""

import glob
import os
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path

from stages.data.readers import readable
from stages.files.artifacts import Refusal, checkout_root

# Folders of the library that nobody wrote by hand or that distributions leave out: without them the corpus
# is the same on Debian, in a container and under pyenv. The generated ones hold machine paths.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
GENERATED = ("_sysconfigdata", "config-")


def library_files():
    """(name, path) of the library's sources, in the order of their names."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY and not name.startswith(GENERATED)]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
    named = ((path.relative_to(library).as_posix(), path) for path in found)
    return sorted((name, path) for name, path in named if path.is_file())


def find_files(paths, root: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file that the paths and globs give, once each, in the order of their names."""
    return matches_of(paths, root)[0]


def matches_of(paths, root: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """The same, and the symbolic links among them that lead nowhere."""
    if not paths:
        from stages.settings.schema import OWN_FILES  # late: the stage config may need no schema

        raise Refusal(f"corpus.paths is empty: name files or globs, {OWN_FILES}")
    found: dict[Path, str] = {}
    broken: dict[Path, None] = {}
    for given in map(str, paths):
        path = root / os.path.expanduser(os.fsdecode(given.encode("utf-8", "surrogateescape")))  # as this locale has it
        if os.path.isdir(path):
            raise Refusal(f"corpus.paths names the folder {given}: name its files, such as {example_of(given, path)}")
        if os.path.isfile(path):
            found[path.resolve()] = readable(path.name)
            continue
        folder, pattern = literal_folder(path)
        names = [name for name in glob_in(folder, pattern) if os.path.isfile(folder / name)]
        links = [folder / name for name in glob_in(folder, pattern) if not os.path.exists(folder / name)]
        broken |= dict.fromkeys(links)
        if not names:
            wrong = "does not exist"
            if links:
                wrong = "is a broken symbolic link" if links == [path] else "matches only broken symbolic links"
            elif glob.has_magic(pattern):
                wrong = "matches no file"
            raise Refusal(f"corpus.paths: {given} {wrong} (looked in {root.resolve()}){in_a_copy(given, root)}")
        for name in names:
            found.setdefault((folder / name).resolve(), readable(name))
    return sorted((name, path) for path, name in found.items()), sorted(broken)


def literal_folder(path: Path) -> tuple[Path, str]:
    """The longest folder on the path that exists, which may have brackets in its name, and the pattern under it."""
    known = next(count for count in range(len(path.parts) - 1, -1, -1) if os.path.isdir(Path(*path.parts[:count])))
    return Path(*path.parts[:known]), os.path.join(*path.parts[known:])


def glob_in(folder: Path, pattern: str) -> list[str]:
    """What the pattern gives; with brackets that mean themselves where it gives nothing."""
    patterns = (pattern, pattern.replace("[", "[[]"))
    return next(filter(None, (glob.glob(each, root_dir=folder, recursive=True) for each in patterns)), [])


def example_of(given: str, folder: Path) -> str:
    """A glob for the folder, of the suffix that most of its files have."""
    files = (name for name in glob.iglob("**/*", root_dir=folder, recursive=True) if os.path.isfile(folder / name))
    ((suffix, _),) = Counter(Path(name).suffix for name in islice(files, 1000)).most_common(1) or [(".txt", 0)]
    return f"{given.rstrip('/')}/**/*{suffix}"


def in_a_copy(given: str, root: Path) -> str:
    if Path(given).is_absolute() or checkout_root(root) == root.resolve():
        return ""
    return "; an experiment in a temporary copy sees only files that git tracks: give an absolute path"
