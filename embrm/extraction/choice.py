"""Chooses the engine that runs an extraction, and loads it."""

from pathlib import Path

from embrm.cache.manifest import NAME, Manifest, read_manifest
from embrm.extraction.engine import Engine, EngineSettings
from embrm.extraction.engines import REFERENCE, choose_engine, engine_module
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts


def with_engine(spec: ExtractSpec, device: str, out: Path | None = None) -> ExtractSpec:
    """`spec` with `engine = "auto"` replaced by the engine that will run.

    A cache that was begun at `out` is continued by the engine that began it; a new one gets the
    first engine that suits this machine.

    Raises: UserError when the engine is not installed or cannot give the spec's views, or when the
    manifest at `out` is damaged.
    """
    name = spec.engine
    if name == "auto" and out and (out / NAME).exists():
        name = made_by(read_manifest(out))
    return spec.model_copy(update={"engine": choose_engine(name, spec.states, device)})


def made_by(manifest: Manifest) -> str:
    """The name of the engine that made a cache."""
    return str(manifest.identity.get("engine", REFERENCE))


def load_engine_for(
    texts: PreparedTexts, device: str, tensor_parallel: int = 1, *, compiled: bool = False
) -> Engine:
    """Load the engine that the spec of the texts names; for "auto", the reference engine.

    tensor_parallel: GPUs that share the model. compiled: whether to use torch.compile.
    Raises: UserError when the engine does not support one of these or refuses the model.
    """
    spec = texts.spec
    settings = EngineSettings(
        folder=texts.folder,
        dtype=spec.dtype,
        device=device,
        views=spec.states,
        top_k=spec.top_k,
        tail_mean=spec.tail_mean,
        max_length=int(texts.lengths.max()),
        trust_remote_code=spec.trust_remote_code,
        tensor_parallel=tensor_parallel,
        compiled=compiled,
    )
    name = REFERENCE if spec.engine == "auto" else spec.engine
    return engine_module(name).open_engine(settings)
