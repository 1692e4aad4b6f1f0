"""The checkpoint that a bundle was built from, loaded anew."""

from pathlib import Path

from sg_export.checkpoint import Overrides, Weights
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.reference import REFERENCES, reference_path
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Source


def reload_checkpoint(bundle: Bundle, checkpoint: str | Path | None) -> LoadedModel:
    """Load the checkpoint that the manifest names, with the facts that it was built with."""
    source, model = bundle.manifest.source, bundle.manifest.model
    path = _find(bundle, source, checkpoint, "--checkpoint")
    loaded = load_model(path, weights=_weights(source), overrides=_stated(bundle))
    if loaded.facts != model:
        raise BundleError(f"{bundle.path}: its manifest describes another model than {path}: build it anew")
    return loaded


def reload_weak(bundle: Bundle, checkpoint: str | Path | None, strong: LoadedModel) -> LoadedModel | None:
    """Load the checkpoint of the weak network, where the bundle has one."""
    source = bundle.manifest.weak_source
    if source is None:
        if checkpoint is not None:
            raise UsageError(f"{bundle.path}: has no weak network: leave out --weak-checkpoint")
        return None
    path = _find(bundle, source, checkpoint, "--weak-checkpoint")
    return load_weak(path, strong, _weights(source), _stated(bundle))


def _stated(bundle: Bundle) -> Overrides:
    """What was known of the model when the bundle was built."""
    model = bundle.manifest.model
    return Overrides(model.route, model.heads, model.prediction)


def _weights(source: Source) -> Weights | None:
    return None if source.weights == "bare" else source.weights


def _find(bundle: Bundle, source: Source, checkpoint: str | Path | None, option: str) -> str | Path:
    """The file of `source`, or the name of the reference model that it is; its hash is that of the manifest."""
    if checkpoint is None:
        candidates = [bundle.path.parent / source.file, Path(source.file)]
        found = [path for path in candidates if path.is_file()]
        checkpoint = source.reference if source.reference in REFERENCES else next(iter(found), None)
        if checkpoint is None:
            raise CheckpointError(
                f"{bundle.path}: its checkpoint {source.file} is neither beside the bundle nor here: give {option}"
            )
    path = reference_path(str(checkpoint)) if str(checkpoint) in REFERENCES else Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the checkpoint of {bundle.path}, {source.file}, found nothing there")
    if (found_hash := sha256_of(path)) != source.sha256:
        raise CheckpointError(
            f"{path}: expected SHA-256 {source.sha256[:12]}…, from which {bundle.path} was built, "
            f"found {found_hash[:12]}…: give its checkpoint, or build a new bundle from this one"
        )
    return checkpoint
