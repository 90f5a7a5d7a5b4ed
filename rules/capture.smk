"""capture: model x calibration text -> what enters every MoE layer.

input    the model and the text that `flags` name
output   a folder with one layer-NNN.safetensors per MoE layer (hidden states, routing, gradients)
"""


rule capture:
    input:
        model_files(),
        text_files([CONFIG.calibrate.text]),
    output:
        directory(f"{OUT}/capture"),
    log:
        f"{OUT}/logs/capture.log",
    benchmark:
        f"{OUT}/benchmarks/capture.tsv"
    threads: CONFIG.runtime.threads
    params:
        **stamps("mxmoe_steps.capture", "torch", "transformers"),
        flags=flags(
            text=CONFIG.calibrate.text,
            no_gradient=not CONFIG.calibrate.gradient,
            **model_flags(),
            **text_flags([CONFIG.calibrate.text], CONFIG.calibrate),
        ),
    shell:
        "python -m mxmoe_steps.capture {params.flags} --out {output:q} 2> {log:q}"
