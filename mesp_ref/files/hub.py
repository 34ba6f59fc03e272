"""Names of the Hugging Face hub in the place of paths: fetched once, then read from the cache.

The huggingface_hub package does the work: its cache (HF_HOME), its account (HF_TOKEN), its mirror
(HF_ENDPOINT), and HF_HUB_OFFLINE=1, with which nothing leaves the machine. What lies here always
wins. Only what is read is fetched: configurations, tokenizer, safetensors; never a pickle.
"""

import fnmatch
import glob
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mesp_ref.errors import MespRefError, escaped
from mesp_ref.files.config import read_config
from mesp_ref.files.names import HUB
from mesp_ref.files.shards import families, require_all
from mesp_ref.files.strict import read_object

_INDEX = "model.safetensors.index.json"
_BESIDE = (
    "config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
_DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")
_NO_DATA = ("dataset_infos.json", "dataset_dict.json", "state.json", "dataset_info.json")
_URI, _TRAIN = "hf://datasets/", re.compile(r"(?:^|[/._-])train(?:$|[/._-])")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")


class HubName(NamedTuple):
    """org/name, a branch, tag or commit of it, and of a data set perhaps one file."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def hub_name(text: str | Path | None) -> HubName | None:
    """What org/name or org/name@revision names on the hub; None for a path, and for what is here."""
    if not isinstance(text, str) or Path(text).exists():
        return None
    repo, at, revision = text.partition("@")
    if not HUB.fullmatch(repo) or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubName(repo, revision or None)


def revision_of(text: str | Path | None) -> str | None:
    """The revision in org/name@revision; None where there is none, as in a path."""
    found = hub_name(text)
    return None if found is None else found.revision


def model_directory(name: str | Path) -> Path:
    """The folder of a checkpoint: a path as it is, a name of the hub fetched into its cache.

    The configuration comes first: what the engine does not compute is refused before its gigabytes.

    Raises MespRefError without network, package, account or such a revision, each in one line
    """
    found = hub_name(name)
    if found is None:
        return Path(name)
    folder = _fetch(found, "model", _BESIDE)
    if not (folder / "config.json").exists():
        raise MespRefError(
            f"{found}: found no config.json on the hub, expected a model's repository"
        )
    read_config(folder)
    files = ["model.safetensors"]
    if (folder / _INDEX).exists():
        shards = read_object(folder / _INDEX, "an index of shards").get("weight_map")
        files = sorted({n for n in shards.values() if isinstance(n, str)}) if shards else []
    folder = _fetch(found._replace(revision=folder.name), "model", files, shown=str(found))
    for file in files:
        if not (folder / file).exists():
            raise MespRefError(
                f"{found}: {file}: not found on the hub, expected safetensors; other kinds of weights "
                "are not fetched, pickles never"
            )
    return folder


def adapter_directory(name: str | Path) -> Path:
    """The folder of an adapter: a path as it is, a name of the hub fetched into its cache.

    Raises MespRefError as model_directory does
    """
    found = hub_name(name)
    if found is None:
        return Path(name)
    folder = _fetch(found, "model", _ADAPTER)
    if not any((folder / file).exists() for file in _ADAPTER[1:]):
        raise MespRefError(
            f"{found}: found no {_ADAPTER[1]} on the hub, expected an adapter's repository; other "
            "kinds of weights are not fetched, pickles never"
        )
    return folder


def data_path(name: str | Path) -> Path:
    """Data: a path as it is; of a data set on the hub its one file, or that for training, or all
    shards of it: FOLDER/train-*-of-00003.parquet, which open_data reads in order.

    org/name, org/name@revision, or one file of several, hf://datasets/org/name/FILE, with a star in
    the place of a number for all its shards.

    Raises MespRefError as model_directory does, and where there are several files to choose from
    """
    text = str(name)
    if text.startswith(_URI):
        org, _, rest = text.removeprefix(_URI).partition("/")
        own, _, file = rest.partition("/")
        found = hub_name(f"{org}/{own}")
        if found is None or not file or ".." in file.split("/"):
            raise MespRefError(f"{text}: found no file's name, expected {_URI}org/name/FILE")
        return _data_file(found._replace(file=file))
    found = None if text.lower().endswith(_DATA) else hub_name(name)
    return Path(name) if found is None else _data_file(found)


def _data_file(found: HubName) -> Path:
    """The file that is meant, or the name of all its shards, in the cache."""
    file, names = found.file or "", [found.file or ""]
    if not file or "*" in file:
        file, names = _chosen(found, _listed(found))
    folder = _fetch(found, "dataset", names)
    if missing := [name for name in names if not (folder / name).exists()]:
        raise MespRefError(f"{found}: {missing[0]}: not found in this data set of the hub")
    return folder / file


def _chosen(found: HubName, files: Iterable[str]) -> tuple[str, list[str]]:
    """The one data file, or the one whose name says train; shards of one are one, in order."""
    held = sorted(f for f in files if f.lower().endswith(_DATA) and Path(f).name not in _NO_DATA)
    if found.file:
        held = [file for file in held if fnmatch.fnmatchcase(file, found.file)]
    every = families(held)
    wanted = every
    if len(every) != 1:
        wanted = {name: group for name, group in every.items() if _TRAIN.search(name.lower())}
    if len(wanted) != 1:
        shown = ", ".join(list(wanted or every)[:4]) or "none"
        raise MespRefError(
            f"{found}: found {len(wanted or every)} data files ({shown}), expected one; name it: "
            f"{_URI}{found._replace(file=None)}/FILE"
        )
    ((file, names),) = wanted.items()
    if "*" in file:
        require_all(found, file, names)
    return file, names


def _listed(found: HubName) -> list[str]:
    """The names of a data set's files: as the hub lists them, or else as the cache holds them."""
    hub, patterns = hub_package(found), [f"*{suffix}" for suffix in _DATA]
    with answered(found, "data set", hub), _silent(hub):
        settings = {"repo_type": "dataset", "revision": found.revision}
        try:
            files = hub.snapshot_download(
                found.repo, allow_patterns=patterns, dry_run=True, **settings
            )
            return [file.filename for file in files]
        except hub.errors.DryRunError:  # no network: the cache, or the line that says why not
            folder = Path(hub.snapshot_download(found.repo, allow_patterns=["."], **settings))
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _fetch(found: HubName, kind: str, files: Iterable[str], shown: str = "") -> Path:
    """The snapshot's folder, with those of the files that the repository has."""
    hub, names = hub_package(found), [glob.escape(file) for file in files]
    what = "data set" if kind == "dataset" else kind
    with answered(found._replace(revision=None) if shown else found, what, hub):
        settings = {"repo_type": kind, "revision": found.revision, "allow_patterns": names}
        _tell(hub, shown or str(found), found.repo, settings)
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if terminal:
            return Path(hub.snapshot_download(found.repo, **settings))
        with _silent(hub):
            return Path(hub.snapshot_download(found.repo, **settings))


def _tell(hub: Any, shown: str, repo: str, settings: dict[str, Any]) -> None:
    """A line on standard error where something is about to be fetched."""
    if hub.utils.are_progress_bars_disabled():
        return
    try:
        with _silent(hub):
            files = hub.snapshot_download(repo, dry_run=True, **settings)
    except hub.errors.DryRunError:  # the hub is out of reach: what the cache holds is taken
        return
    sizes = [file.file_size for file in files if file.will_download]
    if sizes and sys.stderr is not None:
        line = f"fetching {shown}: {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB"
        print(f"hub      {escaped(line)}", file=sys.stderr, flush=True)


@contextmanager
def _silent(hub: Any) -> Iterator[None]:
    """Without the package's own bars, which a log would hold a hundred lines of."""
    before = hub.utils.are_progress_bars_disabled()
    level = hub.utils.logging.get_verbosity()
    hub.utils.disable_progress_bars()
    hub.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.utils.logging.set_verbosity(level)
        if not before:
            hub.utils.enable_progress_bars()


def hub_package(found: HubName) -> Any:
    """huggingface_hub, imported when it is first needed; MespRefError where it is missing."""
    try:
        for part in ("constants", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
        importlib.import_module("huggingface_hub.errors").DryRunError  # noqa: B018  not before 1.0
        return importlib.import_module("huggingface_hub")
    except (ImportError, AttributeError):
        raise MespRefError(
            f"{found}: no such place here, and names of the hub need huggingface_hub: "
            "pip install 'mesp-ref[hub]'"
        ) from None


@contextmanager
def answered(
    found: HubName, what: str, hub: Any, here: str = "no such place here, and "
) -> Iterator[None]:
    """Whatever the package raises, as a line that says what to do."""
    errors = hub.errors
    try:
        yield
    except MespRefError:
        raise
    except errors.GatedRepoError:
        why = (
            "asks for an account that has accepted its terms; accept them on its page, then "
            "hf auth login, or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        why = f"has no revision {found.revision}; name a branch, a tag or a commit of it"
    except errors.RepositoryNotFoundError:
        why = (
            f"no such {what}, or a private one; check the name, or log in with hf auth login or "
            "HF_TOKEN"
        )
    except errors.LocalEntryNotFoundError:
        why = _out_of_reach(hub)
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        why = f"the hub answered {code}; " + (
            "log in with hf auth login, or set HF_TOKEN"
            if code in (401, 403)
            else "try again later"
        )
    except Exception as error:
        lines = str(error).split("\n")
        why = f"not fetched: {type(error).__name__}: {lines[0] or 'no reason given'}"
    else:
        return
    raise MespRefError(f"{found}: {here}on the hub: {why}")


def _out_of_reach(hub: Any) -> str:
    if hub.constants.HF_HUB_OFFLINE:
        return (
            "not all of it is in the cache, and HF_HUB_OFFLINE is set; unset it to fetch the rest"
        )
    return (
        f"{hub.constants.ENDPOINT} is out of reach, and not all of it is in the cache; try again "
        "with a network, or name a directory"
    )
