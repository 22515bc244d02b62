"""PRESETS: the settings of each backbone. A stage's flag overrides its preset."""

# The paper's settings for both of its kinds of backbones. Sizes of 0: all there is.
PAPER = {
    "train_size": 0,
    "validation_size": 0,
    "test_size": 0,
    "public_size": 0,
    "candidates": 3000,
    "proxies": 500,
    "lora_rank": 16,
    "lora_alpha": 32,
    "expert_epochs": 10,
    "lambda_lr": 1e-3,
}

# The paper's settings for CLIP.
PAPER_CLIP = {
    "kind": "clip",
    "data": "images",
    "template": "This is a photo of a {}",
    "resize": 256,  # the shorter side, before the crop to the image size; of another size in proportion
    "image_size": 224,
    "flip": True,
    **PAPER,
    "expert_lr": 0.01,
    "expert_batch": 128,
    "warmup_steps": 0,
    "optimizer": "sgd",
    "weight_decay": 1e-4,
    "final_epochs": 5,
    "final_batch": 128,
    "lambda_init": 0.3,
    "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-3, "btx": 1e-3, "unrestricted": 1e-3},
}

# The paper's settings for LLaMA. A training size of 0: all there is, up to 10,000 samples a client.
PAPER_LLAMA = {
    "kind": "text",
    "data": "qa",
    "embed": "input",  # relevance and the DPP use the question alone, without the prompt around it
    "loss": "text",
    "answers": "letters",
    "scoring": "letters",
    "max_length": 256,
    **PAPER,
    "validation_size": 500,
    "expert_lr": 1e-4,
    "expert_batch": 32,
    "warmup_steps": 200,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "final_epochs": 1,
    "final_batch": 32,
    "lambda_init": 1.0,
    "final_lr": {"metamoe": 1e-4, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
}

LLAMA_8B = {"seed_model": "meta-llama/Llama-3.1-8B", "gradient_checkpointing": True}  # for 80 GB

# The paper's settings for its backbones, and what the embedded defaults change of them.
PRESETS = {
    "vit-b-32": PAPER_CLIP | {"architecture": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "vit-b-16": PAPER_CLIP | {"architecture": "ViT-B-16-quickgelu", "pretrained": "openai"},
    "llama-3.2-3b": PAPER_LLAMA | {"seed_model": "meta-llama/Llama-3.2-3B"},
    "llama-3.1-8b": PAPER_LLAMA | LLAMA_8B,
    # A CLIP small enough to train here, on drawn letters (metamoe/data/glyphs/).
    "glyph-clip": PAPER_CLIP
    | {
        "data": "glyphs",
        "architecture": "glyph-clip",
        "pretrained": "",
        "template": "{}",
        "resize": 32,
        "image_size": 32,
        "flip": False,
        "train_size": 500,
        "validation_size": 150,
        "test_size": 300,
        "public_size": 6000,
        "candidates": 480,
        "proxies": 80,
        "expert_epochs": 6,
        "expert_lr": 1e-3,
        "expert_batch": 16,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "final_epochs": 2,
        "final_batch": 32,
        "lambda_init": 1.0,
        # the gentlest that ties with the best (docs/results-glyph-clip.md)
        "final_lr": {
            "metamoe": 1e-5,
            "flexolmo": 1e-5,
            "btx": 1e-5,
            "unrestricted": 1e-3,
            "moa": 1e-1,
            "btx-paper": 1e-5,
        },
    },
    "smollm2-135m": PAPER_LLAMA
    | {
        "data": "bigbench",
        "embed": "prompt",
        "loss": "answer",
        "answers": "text",
        "scoring": "likelihood",
        "train_size": 400,
        "validation_size": 80,
        "test_size": 200,
        "public_size": 5000,
        "candidates": 900,
        "proxies": 150,
        "expert_epochs": 4,
        "expert_lr": 5e-4,
        "expert_batch": 8,
        "warmup_steps": 10,
        "final_batch": 16,
        # the gentlest that ties with the best (docs/results-smollm2-135m.md)
        "final_lr": {"metamoe": 1e-5, "flexolmo": 1e-5, "btx": 1e-5, "unrestricted": 1e-5},
    },
}
