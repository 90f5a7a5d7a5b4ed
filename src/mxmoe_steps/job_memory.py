"""Memory that a job of each step needs at most, from the sizes of the model: what the rules ask a cluster for.

Upper bounds, not predictions: every term is rounded up, and a job that starts a GPU has its share of host memory for
that. Stdlib only.
"""

from dataclasses import dataclass

from mxmoe_steps.models.families import ModelFolder

_START = 3 << 30  # Python, PyTorch and, on a GPU node, CUDA
_LIGHT = 2 << 30  # steps without PyTorch
_WORKSPACE = 8 << 30  # `calibration.weights` quantizes as many experts at a time as fit
_LOGITS = 4 * (4 << 25)  # `streaming` has at most this many bytes of them and of what is computed from them
_TUNED_BYTES = 48  # a weight as code, gradient, what Adam keeps, and temporaries
_SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
)
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_ACTIVATIONS = 16  # copies of a run's hidden states that are alive within a layer


@dataclass(frozen=True)
class Sizes:
    """Weights of one decoder layer, of its experts alone and of the embedding; features of a hidden state."""

    layer: int
    experts: int
    embedding: int
    hidden: int

    @classmethod
    def of(cls, model: ModelFolder) -> "Sizes":
        """From ``config.json``."""
        config = model.text
        hidden = int(config["hidden_size"])
        dense = int(config.get("intermediate_size") or 0)
        width = int(config.get("moe_intermediate_size") or dense)
        alone = next((config[key] for key in _SHARED_WIDTHS if config.get(key)), 0)
        together = next(
            (config[key] for key in _SHARED_COUNTS if config.get(key)), int(model.family.shared is not None)
        )
        shared = int(alone or width * together)
        experts = 3 * hidden * (model.experts * width + shared)
        dense = 3 * hidden * dense
        feed_forward = max(experts, dense) if model.family.moe else experts + dense  # one of them, or both in a layer
        return cls(feed_forward + 8 * hidden**2, experts, int(config["vocab_size"]) * hidden, hidden)


def whole_model_memory(sizes: Sizes, layers: int, element: int, run_tokens: int) -> int:
    """MiB that a job of `tasks` needs: all of the model, and the logits of one forward pass in three copies."""
    weights = (layers * sizes.layer + 2 * sizes.embedding) * element
    logits = 3 * run_tokens * sizes.embedding // sizes.hidden * 4
    return -(-(_START + weights + logits) >> 20)


def job_memory(sizes: Sizes, element: int, run_tokens: int, calibration_tokens: int) -> dict[str, int]:
    """Step -> MiB (Slurm's unit, whatever it calls it).

    ``element``: bytes of a weight or activation. ``run_tokens``: tokens in one forward pass of the longest text
    section; ``calibration_tokens``: all that `capture` keeps of a layer.
    """
    layer, run = 3 * sizes.layer * element, _ACTIVATIONS * run_tokens * sizes.hidden * max(element, 4)
    forward = _START + max(layer, 2 * sizes.embedding * max(element, 4) + _LOGITS) + run
    # Inputs and gradients of a layer and of the next one, and one of them by domain, before it is joined.
    captured = 5 * calibration_tokens * sizes.hidden * element
    calibrate = _START + 3 * sizes.experts * element + min(_WORKSPACE, 20 * 4 * sizes.experts) + captured
    tune = forward + _TUNED_BYTES * sizes.experts + captured
    found = {
        "trace": forward,
        "capture": forward + 2 * run,
        "calibrate": calibrate,
        "compile": 4 * _LIGHT,
        "measure": 4 * _LIGHT,
        "profile": _LIGHT,
        "frontier": 4 * _LIGHT,
        "extrapolate": 4 * _LIGHT,
        "solve": _LIGHT,
        "tune": tune,
        "quantize": _LIGHT + max(sizes.experts, sizes.embedding) * element,
        "evaluate": forward,
        "time": _START + layer,
        "report": 2 * _LIGHT,
    }
    return {step: -(-memory >> 20) for step, memory in found.items()}
