"""From a checkpoint to the PyTorch model that graphs are traced from and compared with."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from sg_export.adapters import ADAPTERS, find_adapter
from sg_export.checkpoint import Overrides, Weights, merge_facts, read_checkpoint
from sg_export.models.sparse import SparseModel
from sg_export.reference import REFERENCES, reference_path
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Level, ModelFacts, Source


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint as a PyTorch model in FP32 and evaluation mode: `model(x, t, classes, keep)`."""

    model: SparseModel
    facts: ModelFacts
    source: Source

    def kept_count(self, sparsity: float) -> int:
        """Tokens that a branch keeps at `sparsity`, by the family's rounding."""
        return ADAPTERS[self.facts.family].kept_count(self.facts.tokens, sparsity)

    def level(self, sparsity: float) -> Level:
        """The kept token count at `sparsity` in [0, 1), by the family's rounding.

        Raises UsageError for a sparsity that is out of range, keeps no token, or is not 0 and keeps all; or where the
        model's route is unknown.
        """
        tokens = self.facts.tokens
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity {sparsity:g}: expected at least 0 and less than 1")
        keep = self.kept_count(sparsity)
        if sparsity > 0 and self.facts.route is None:
            raise UsageError(
                f"{self.source.file}: the route is unknown, so no branch can be sparse: give --route START-END, both "
                f"blocks included; upstream's for {self.facts.depth} blocks is "
                f"{ADAPTERS[self.facts.family].usual_route(self.facts.depth)}"
            )
        if keep < 1 or (keep == tokens and sparsity > 0):
            kept = "no token" if keep < 1 else "all tokens"
            raise UsageError(f"sparsity {sparsity:g}: keeps {kept} of {tokens}: expected one that keeps some")
        return Level(float(sparsity), keep)


def load_model(
    checkpoint: str | Path, *, weights: Weights | None = None, overrides: Overrides | None = None
) -> LoadedModel:
    """Load a checkpoint file, or a reference model by name.

    weights: "ema" or "model" where the file holds both; EMA by default. Raises CheckpointError or UsageError.
    """
    read = read_checkpoint(checkpoint, weights)
    model, facts = find_adapter(read).build(read, overrides or Overrides())
    return LoadedModel(model, facts, read.source)


def load_weak(
    checkpoint: str | Path, strong: LoadedModel, weights: Weights | None, overrides: Overrides | None = None
) -> LoadedModel:
    """Load the weak network of autoguidance, an earlier checkpoint of the run that `strong` is from.

    overrides: what the user states of both. What neither they nor the checkpoint state is taken from `strong`. Raises
    UsageError where it is another network.
    """
    facts, read = strong.facts, read_checkpoint(checkpoint, weights)
    given = merge_facts(read, overrides or Overrides())
    heads = facts.heads if given.heads is None else given.heads
    completed = Overrides(given.route or facts.route, heads, given.prediction or facts.prediction)
    model, own = find_adapter(read).build(read, completed)
    same = replace(own, class_names=facts.class_names, space=facts.space)
    if same != facts:
        differing = [f.name for f in fields(facts) if getattr(same, f.name) != getattr(facts, f.name)]
        told = "; ".join(f"{name}: expected {getattr(facts, name)}, found {getattr(same, name)}" for name in differing)
        raise UsageError(
            f"{read.source.file}: expected an earlier checkpoint of the network in {strong.source.file}; {told}"
        )
    return LoadedModel(model, facts, read.source)


def reload_checkpoint(bundle: Bundle, checkpoint: str | Path | None) -> LoadedModel:
    """Load the checkpoint that the manifest names, with the facts that it was built with."""
    source, model = bundle.manifest.source, bundle.manifest.model
    path = _checkpoint_of(bundle, source, checkpoint, "--checkpoint")
    loaded = load_model(path, weights=_weights_of(source), overrides=_overrides_of(bundle))
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
    path = _checkpoint_of(bundle, source, checkpoint, "--weak-checkpoint")
    return load_weak(path, strong, _weights_of(source), _overrides_of(bundle))


def _overrides_of(bundle: Bundle) -> Overrides:
    """What was known of the model when the bundle was built."""
    model = bundle.manifest.model
    return Overrides(model.route, model.heads, model.prediction)


def _weights_of(source: Source) -> Weights | None:
    return None if source.weights == "bare" else source.weights


def _checkpoint_of(bundle: Bundle, source: Source, checkpoint: str | Path | None, option: str) -> str | Path:
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
