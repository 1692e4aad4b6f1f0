"""Facts about the parts of a bundle next to the denoiser: text encoder and decoder."""

from dataclasses import dataclass

from sg_runtime.manifest.base import Cleaning, EngineLibrary, Precision, Strict, TensorFacts
from sg_runtime.manifest.graphs import EngineFacts, GraphFacts, find_engine
from sg_runtime.manifest.source import Source


@dataclass(frozen=True, slots=True)
class BuiltGraph(Strict):
    """A graph of a part, and its engines."""

    graph: GraphFacts
    engines: tuple[EngineFacts, ...]


@dataclass(frozen=True, slots=True)
class PartFacts(Strict):
    """A network with one graph, which runs one row at a time.

    source: what the network was read from.
    precision: precision of its products.
    built: its graph; if it depends on the size of the samples, one for each size.
    """

    source: Source
    precision: Precision
    built: tuple[BuiltGraph, ...]

    @property
    def all_graphs(self) -> tuple[GraphFacts, ...]:
        """The graphs of all sizes."""
        return tuple(built.graph for built in self.built)

    @property
    def all_engines(self) -> tuple[EngineFacts, ...]:
        """The engines of all sizes."""
        return tuple(engine for built in self.built for engine in built.engines)

    def engine(
        self, graph: GraphFacts, batch: int, library: EngineLibrary | None = None
    ) -> tuple[EngineFacts, int] | None:
        """Return the engine for `graph` and the index of its profile; see `find_engine`."""
        own = [engine for built in self.built if built.graph == graph for engine in built.engines]
        return find_engine(own, graph, batch, library)

    def find(self, inputs: tuple[TensorFacts, ...]) -> GraphFacts | None:
        """Return the graph with these inputs, or None."""
        return next((graph for graph in self.all_graphs if graph.inputs == inputs), None)


@dataclass(frozen=True, slots=True)
class TextEncoder(PartFacts):
    """The text encoder: ids and mask of a prompt's tokens to their embeddings.

    tokenizer: file of the tokenizer in the bundle, as the library tokenizers writes it. It states
    padding and cut, to the number of tokens that the model takes.
    cleaning: rule by which a prompt is cleaned before it is tokenized.
    capped: whether attention caps its scores by a tanh. No fused attention does that.
    """

    tokenizer: str
    cleaning: Cleaning
    capped: bool


@dataclass(frozen=True, slots=True)
class Decoder(PartFacts):
    """The decoder: latents to an image with values in [-1, 1]."""


def text_inputs(tokens: int) -> tuple[TensorFacts, ...]:
    """Return the inputs of the text encoder's graph for a prompt of this many tokens."""
    return tuple(TensorFacts(name, "int64", (1, tokens)) for name in ("ids", "mask"))


def text_outputs(tokens: int, width: int) -> tuple[TensorFacts, ...]:
    """Return the outputs of the text encoder's graph. width: size of an embedding."""
    return (TensorFacts("embeddings", "float32", (1, tokens, width)),)


def decode_inputs(latent: tuple[int, int, int]) -> tuple[TensorFacts, ...]:
    """Return the inputs of the decoder's graph for a sample of this shape (C, H, W)."""
    return (TensorFacts("latents", "float32", (1, *latent)),)


def decode_outputs(latent: tuple[int, int, int], per: int) -> tuple[TensorFacts, ...]:
    """Return the outputs of the decoder's graph. per: height and width of a latent in pixels."""
    return (TensorFacts("images", "float32", (1, 3, latent[1] * per, latent[2] * per)),)
