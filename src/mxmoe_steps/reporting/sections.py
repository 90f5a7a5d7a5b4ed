"""The sections of the page, in its order: headings, and what each shows. Figures have the same captions elsewhere."""

from collections.abc import Collection

OPENING = (
    "First row: the smallest of our checkpoints whose perplexity is within 5 % of the original's, or the nearest"
    " to it. Below it the best uniform checkpoint within the same budget, the original, and the best of every"
    " other budget."
)
STEP_HEADS = ("step", "jobs", "seconds", "processor seconds", "MB at most")
SECTIONS = {  # name of a section, and of its figure -> heading, what it shows; in the page's order
    "checkpoints": (
        "Checkpoints",
        "Bits count 16-bit scales and zero points, averaged over all weights of routed and shared experts."
        " Perplexity and KL divergence are of the packed weights on held-out text. Uniform checkpoints use the"
        " best single scheme within the budget. MB are those of all weights on disk, also as shares of the"
        " original in 16 bits and as it was published; embeddings, attention and layers that predict tokens ahead"
        " are not experts and in no budget.",
    ),
    "texts": (
        "Texts",
        "Every text's KL divergence over that of the uniform checkpoint of the same budget and quantizer, and"
        " every calibration domain's predicted loss over that of the best single scheme within the budget; the"
        " worst first. Above 1 the mixture is worse there.",
    ),
    "tasks": (
        "Tasks",
        "Scores on tasks of lm-evaluation-harness, with standard errors. Those within two standard errors of what"
        " guessing among the choices scores are at chance level: differences between them mean nothing. Checkpoints"
        " answer the same questions, so a difference between two of them is more certain than their errors suggest.",
    ),
    "quality": (
        "Quality over size",
        "Lower is better on both axes. All checkpoints of one column of markers obey the same budget. Hollow"
        " markers are tuned checkpoints.",
    ),
    "speed": (
        "Quality over time",
        "Each marker is a checkpoint. Left and down is better. Above are predicted times of a layer's expert"
        " GEMMs; where the layers were measured on this GPU, measured times are below.",
    ),
    "extrapolated": (
        "Loss against time at the size of a real model",
        "Not a measurement of that model: its layer shapes, with traffic that is skewed as in the kernels' benchmarks,"
        " under the losses of the small model, spread over the larger layers so that their sums stay. Times are those"
        " of the real shape, by the same profile. Lines are the frontiers under a budget of bits, stars what r picks,"
        " squares uniform schemes of any size. A mixture wins where a line is left of and below the squares within its"
        " budget.",
    ),
    "frontier": (
        "Frontiers",
        "Every allocation that is best for some exchange rate between loss and time, as the solver predicts them;"
        " dots are the allocations that were chosen. Of many frontiers, some are drawn.",
    ),
    "allocation": (
        "Allocations",
        "The scheme of every gate, up and down block; S is the shared expert. Of many allocations, some are"
        " drawn, from the smallest budget to the largest.",
    ),
    "sensitivity": (
        "Sensitivity",
        "What quantizing one block alone does to the model, per scheme.",
    ),
    "losses": (
        "Predicted against measured loss",
        "What the losses of the blocks add up to, on calibration text, and the KL divergence of the checkpoint,"
        " on held-out text. On the dotted line blocks damage the model independently and both texts are alike.",
    ),
    "traffic": (
        "Expert traffic",
        "How many tokens each expert gets, relative to an even split.",
    ),
    "roofline": (
        "Roofline of a layer",
        "Each expert of the middle layer under the allocation of the first row above: operations a byte of"
        " weights and activations, and the rate that the time model predicts for its part of the launch. Roofs are"
        " the memory's bandwidth and the fastest tiles of the profile. Large markers are the shared expert, hollow"
        " ones fp8.",
    ),
    "times": (
        "Kernel times",
        "Left: the rate at which tiles of a prefill kernel multiply on a busy GPU. Right, where the GPU was"
        " measured: predicted over measured time of random launches that the model was not fitted to, with lines"
        " 20 % above and below.",
    ),
    "measured": (
        "Measured on this GPU",
        "A layer's expert GEMMs as the time model predicts them and as they were measured, with the error of the"
        " prediction; the whole layer behind its router; and tokens a second of the whole model in transformers, which"
        " decodes with a static cache, or prefills. The original's layer is transformers' bfloat16 experts, the faster"
        " of its implementations.",
    ),
    "run": (
        "Time and memory of each step",
        "Of the jobs that made these results, which ran side by side: sums of seconds, and the memory of the"
        " largest job.",
    ),
    "provenance": (
        "Provenance",
        "The model, the GPU and the versions that made these numbers.",
    ),
}

CATEGORIES = {  # of figures, in `snakemake --report`
    "quality": "Quality",
    "speed": "Quality",
    "extrapolated": "Quality",
    "losses": "Quality",
    "tasks": "Quality",
    "frontier": "Allocation",
    "allocation": "Allocation",
    "sensitivity": "Model",
    "traffic": "Model",
    "roofline": "GPU",
    "times": "GPU",
}


def drawn_figures(without: Collection[str]) -> list[str]:
    """Names of the figures of a report, ``without`` those that the configuration asks no results for."""
    return sorted(CATEGORIES.keys() - set(without))
