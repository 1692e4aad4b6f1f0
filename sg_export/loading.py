"""Loader of checkpoints as PyTorch models, which graphs are traced from and compared with."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from sg_export.adapters import ADAPTERS, find_adapter
from sg_export.checkpoint import Checkpoint, Overrides, checkpoint_files, merge_facts, read_checkpoint
from sg_export.models.sparse import SparseModel
from sg_export.recognize import what_is
from sg_export.reference import REFERENCES, place_of
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Labels, Level, ModelFacts, Sampling, Source, Text


@dataclass(frozen=True, slots=True, eq=False)  # a model is equal to itself alone
class LoadedModel:
    """A checkpoint as a PyTorch model.

    model: network in FP32 and evaluation mode, called as `model(x, t, conditions, keep)`.
    facts: facts of the network.
    sampling: the family's default sampling.
    source: file name and hash of the checkpoint.
    """

    model: SparseModel
    facts: ModelFacts
    sampling: Sampling
    source: Source

    def kept_count(self, sparsity: float) -> int:
        """Return how many tokens a branch keeps at `sparsity`, by the family's rounding."""
        return ADAPTERS[self.facts.family].kept_count(self.facts.tokens, sparsity)

    def level(self, sparsity: float) -> Level:
        """Return the level of a branch: `sparsity` in [0, 1) and the number of kept tokens.

        Raises UsageError for a sparsity that is out of range, that keeps no token, or that keeps
        all tokens without being 0. Raises UsageError for a sparse level if the route is unknown.
        """
        tokens = self.facts.tokens
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity {sparsity:g}: expected at least 0 and less than 1")
        keep = self.kept_count(sparsity)
        if sparsity > 0 and self.facts.route is None:
            raise UsageError(
                f"{self.source.file}: the route is unknown, so no branch can be sparse: give `route` START-END, both "
                f"blocks included; upstream's route for {self.facts.depth} blocks is "
                f"{ADAPTERS[self.facts.family].usual_route(self.facts.depth)}"
            )
        if keep < 1:
            raise UsageError(f"sparsity {sparsity:g} keeps none of the {tokens} tokens: use a lower sparsity")
        if keep == tokens and sparsity > 0:
            raise UsageError(f"sparsity {sparsity:g} keeps all {tokens} tokens: use 0, or a higher sparsity")
        return Level(float(sparsity), keep)

    def at(self, height: int, width: int) -> "LoadedModel":
        """Return the model for pictures of height × width pixels, with the same parameters.

        Raises UsageError if its family has one size, and for a size that does not fit it.
        """
        adapter = ADAPTERS[self.facts.family]
        model, facts = adapter.resized(self.source.file, self.model, self.facts, (height, width))
        return replace(self, model=model, facts=facts)


def load_model(
    checkpoint: str | Path, *, weights: str | None = None, overrides: Overrides | None = None
) -> LoadedModel:
    """Load a checkpoint, see `read_checkpoint`, or a reference model by name.

    weights: "ema", "model", or the key of another set of weights in the file; EMA by default. In a
    folder of diffusers, the variant of the weights.

    Raises CheckpointError for an unusable file, and UsageError for facts that do not fit it.
    """
    return _model_of(read_checkpoint(checkpoint, weights), overrides or Overrides())


def _model_of(read: Checkpoint, overrides: Overrides) -> LoadedModel:
    adapter = find_adapter(read)
    model, facts = adapter.build(read, overrides)
    return LoadedModel(model, facts, adapter.sampling(read, facts), read.source)


def load_weak(
    checkpoint: str | Path, strong: LoadedModel, weights: str | None, overrides: Overrides | None = None
) -> LoadedModel:
    """Load the weak network of autoguidance.

    checkpoint: an earlier checkpoint of the training run of `strong`.
    overrides: the user's facts about both networks. Facts that neither the user nor the checkpoint
    states are taken from `strong`.

    Raises UsageError if the checkpoint is of another network than `strong`.
    """
    return _weak_of(read_checkpoint(checkpoint, weights), strong, overrides or Overrides())


def _weak_of(read: Checkpoint, strong: LoadedModel, overrides: Overrides) -> LoadedModel:
    facts, given, known = strong.facts, merge_facts(read, overrides), _stated_by(strong.facts)
    stated = {f.name: value for f in fields(given) if (value := getattr(given, f.name)) is not None}
    completed = replace(known, **stated)
    model, weak_facts = find_adapter(read).build(read, completed)
    same = replace(weak_facts, conditions=_named_as(facts.conditions, weak_facts.conditions), space=facts.space)
    if same != facts:
        names = [field.name for field in fields(facts) if field.name != "held"]  # it follows from the others
        differing = [name for name in names if getattr(same, name) != getattr(facts, name)]
        differences = "; ".join(
            f"{name}: expected {getattr(facts, name)}, found {getattr(same, name)}" for name in differing
        )
        raise UsageError(
            f"{read.source.file}: expected an earlier checkpoint of the network in {strong.source.file}; {differences}"
        )
    return LoadedModel(model, facts, strong.sampling, read.source)


def _named_as(named: Labels | Text, conditions: Labels | Text) -> Labels | Text:
    """Return `conditions` with the names of the classes in `named`."""
    both = isinstance(named, Labels) and isinstance(conditions, Labels) and named.count == conditions.count
    return named if both else conditions


def reload_checkpoint(bundle: Bundle, checkpoint: str | Path | None) -> LoadedModel:
    """Load the checkpoint that the manifest names, with the facts that the bundle was built with.

    Raises CheckpointError if the file is missing or has another hash, and BundleError if the loaded
    model does not have the facts of the manifest.
    """
    source, model, sampling = bundle.manifest.source, bundle.manifest.model, bundle.manifest.sampling
    read = _read_of(bundle, source, checkpoint, "checkpoint")
    loaded = _model_of(read, _stated_by(model))
    if (loaded.facts, replace(loaded.sampling, steps=sampling.steps)) != (model, sampling):
        raise BundleError(
            f"{bundle.path}: its manifest describes another model than {read.source.file}: build it again"
        )
    return loaded


def reload_weak(bundle: Bundle, checkpoint: str | Path | None, strong: LoadedModel) -> LoadedModel | None:
    """Load the checkpoint of the weak network; return None if the bundle has no weak network.

    Raises UsageError if `checkpoint` is given for a bundle without a weak network, and
    CheckpointError if the file is missing or has another hash than the manifest states.
    """
    source = bundle.manifest.weak_source
    if source is None:
        if checkpoint is not None:
            raise UsageError(f"{bundle.path}: has no weak network: leave out `weak_checkpoint`")
        return None
    return _weak_of(_read_of(bundle, source, checkpoint, "weak_checkpoint"), strong, _stated_by(strong.facts))


def _stated_by(model: ModelFacts) -> Overrides:
    """Return the facts that lead to this model again."""
    known = Overrides(model.route, model.heads, model.prediction)
    if isinstance(model.conditions, Text):
        return replace(known, size=model.picture, text_tokens=model.conditions.tokens)
    return known


def found_by_name(bundle: Bundle, source: Source) -> Path | None:
    """Return a checkpoint next to the bundle or in the current folder, if it is there."""
    candidates = (bundle.path.parent / source.file, Path(source.file))
    return next((path for path in candidates if path.exists()), None)


def _read_of(bundle: Bundle, source: Source, checkpoint: str | Path | None, parameter: str) -> Checkpoint:
    """Read the file of `source`, or the reference model.

    Raises CheckpointError if the file is missing, or if its hash differs from that in the manifest.
    """
    if checkpoint is None:
        checkpoint = source.reference if source.reference in REFERENCES else found_by_name(bundle, source)
        if checkpoint is None:
            raise CheckpointError(
                f"{bundle.path}: its checkpoint {source.file} is neither next to the bundle nor in the current "
                f"folder: give `{parameter}`"
            )
    path = place_of(checkpoint)
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected the checkpoint of {bundle.path}, {source.file}, found {what_is(str(checkpoint))}"
        )
    weights = None if source.weights == "bare" else source.weights
    if (found_hash := sha256_of(*checkpoint_files(path, weights).all)) != source.sha256:
        raise CheckpointError(
            f"{path}: expected SHA-256 {source.sha256[:12]}…, from which {bundle.path} was built, "
            f"found {found_hash[:12]}…: give that checkpoint, or build a new bundle from this one"
        )
    return read_checkpoint(checkpoint, weights, found_hash)
