"""`dp_sidecar_info` and `dp_sidecar_load`. Their maps: protocol/docs/weight-update.md."""

from __future__ import annotations

import os
from typing import Any

from dp_sidecar_shim import __version__, checkpoint, names, reload
from dp_sidecar_shim.calls import MIXED, ShimError, answer, change, check, fail
from dp_sidecar_shim.segment import Segment

LOADED = "loaded"
RESTORED = "restored-meta"
# What describes the files of a request.
FILES: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "files": (list,),
    "extents": (list, tuple, type(None)),
    "tensors": (int,),
    "bytes": (int,),
    "digest": (str, type(None)),
    "digest_kind": (str,),
}


# Raise `ShimError` unless the request describes files.
def check_files(request: dict[str, Any]) -> None:
    check(request, FILES)
    if not all(isinstance(name, str) for name in request["files"]):
        raise ShimError("request", "files holds something other than names")
    if not os.path.isabs(request["path"]):
        raise ShimError("request", f"path {request['path']!r} is not absolute")
    if request["digest_kind"] not in ("blake3", "none"):
        raise ShimError("request", f"digest_kind {request['digest_kind']!r} is not known")


def load(worker: Any, request: Any) -> dict[str, Any]:
    """Load a checkpoint over the running model; says what the worker holds afterwards."""
    return change(worker, request, lambda found: _load(worker, request, found))


def _load(worker: Any, request: dict[str, Any], found: dict[str, Any]) -> None:
    check_files(request)
    account = checkpoint.Consumption(request["digest_kind"])
    found["digest_kind"] = account.kind
    source: checkpoint.Checkpoint | Segment
    if request.get("extents") is None:
        source = checkpoint.Checkpoint(request["path"], request["files"])
    else:
        source = Segment(request["path"], request["files"], request["extents"])
    try:
        there = source.entries
        checkpoint.compare_counts(len(there), sum(entry.length for entry in there), request)
        prefixes = request.get("rename") or []
        if len({checkpoint.renamed(entry.name, prefixes) for entry in there}) != len(there):
            raise ShimError("files", "a tensor occurs twice in the files")
    except BaseException:
        source.close()
        raise
    # From here on nothing is raised: what the worker holds depends on how far it came.
    try:
        reload.reload_weights(worker, checkpoint.tensors(source, account, prefixes))
        account.compare(found, request)
        if reload.torn(worker):
            raise ShimError("load", "the model has tensors on the meta device after the load")
        found["state"] = LOADED
    except Exception as error:
        found.update(tensors=account.tensors, bytes=account.bytes)
        fail(found, error, "load")
    if found["error"] is not None:
        found["state"] = RESTORED if reload.clean_up(worker) else MIXED
    try:
        reload.let_go(worker, source)
    except Exception as error:
        fail(found, error)
        found["state"] = MIXED


def info(worker: Any, path: str | None = None, tensors: Any = ()) -> dict[str, Any]:
    """Who this worker is, which files of `path` or its checkpoint count, which tensors do not."""

    def tell(found: dict[str, Any]) -> None:
        config, model = worker.vllm_config, worker.vllm_config.model_config
        lora, load = getattr(config, "lora_config", None), config.load_config
        found["vllm_version"] = reload.vllm_version()
        found["max_lora_rank"] = None if lora is None else int(lora.max_lora_rank)
        found["load_format"] = str(getattr(load.load_format, "value", load.load_format))
        found["model_path"] = local_directory(model, load)
        found["files"] = reload.files_in(worker, path or found["model_path"])
        found["draft"] = getattr(getattr(config, "speculative_config", None), "method", None)
        found["kv_connectors"] = connectors_that_keep()
        found["tied"] = names.tied(reload.model_of(worker))
        # Who asks about none does not have a twin made.
        found["ignored"] = tensors and names.ignored(worker, reload.model_of(worker), tensors)

    return answer(worker, tell, shim_version=__version__)


# KV connectors without a `reset_cache` of their own: vLLM's logs that, and answers None.
def connectors_that_keep() -> list[str]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1

    made = get_kv_transfer_group() if has_kv_transfer_group() else None
    kinds = [type(part) for part in getattr(made, "_connectors", [made]) if part is not None]
    none = getattr(KVConnectorBase_V1, "reset_cache", None)
    return [kind.__name__ for kind in kinds if getattr(kind, "reset_cache", None) is none]


def local_directory(model: Any, load: Any) -> str:
    """Directory of the checkpoint of the command line; the snapshot for a name on a hub."""
    path, revision = str(model.model), getattr(model, "revision", None)
    if os.path.isdir(path):
        return os.path.realpath(path)
    from huggingface_hub import snapshot_download

    # vLLM has fetched what it needs and no more. Without a pattern, any other file is missed.
    where = {"revision": revision, "cache_dir": load.download_dir, "local_files_only": True}
    return str(snapshot_download(path, allow_patterns=["config.json"], **where))
