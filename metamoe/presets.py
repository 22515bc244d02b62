"""PRESETS: the settings of each backbone, the paper's or the embedded default's. A stage's flag overrides its preset."""




# The paper's settings for CLIP. Sizes of 0: all there is.
PAPER_CLIP = {
    "kind": "clip", "data": "images", "template": "This is a photo of a {}", "resize": 256, "flip": True,
    "train_size": 0, "validation_size": 0, "test_size": 0, "public_size": 0, "candidates": 3000, "proxies": 500,
    "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 0.01, "expert_batch": 128, "warmup_steps": 0,
    "optimizer": "sgd", "weight_decay": 1e-4, "final_epochs": 5, "final_batch": 128, "lambda_lr": 1e-3, "lambda_init": 0.3,
    "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-3, "btx": 1e-3, "unrestricted": 1e-3},
}


# The paper's settings for LLaMA. Here a training size of 0 is all there is, up to the paper's 10,000 samples a client.
PAPER_LLAMA = {
    "kind": "text", "data": "qa", "optimizer": "adamw", "weight_decay": 0.0, "max_length": 256,
    "embed": "input",  # the text that relevance and the DPP work on: the question alone, not the prompt around it
    "loss": "text", "answers": "letters", "scoring": "letters",
    "train_size": 0, "validation_size": 500, "test_size": 0, "public_size": 0, "candidates": 3000, "proxies": 500,
    "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 1e-4, "expert_batch": 32, "warmup_steps": 200,
    "final_epochs": 1, "final_batch": 32, "lambda_lr": 1e-3, "lambda_init": 1.0,
    "final_lr": {"metamoe": 1e-4, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
}


# The settings of the paper for its backbones, and those of the embedded defaults. A stage's flag overrides its preset.
PRESETS = {
    "vit-b-32": PAPER_CLIP | {"architecture": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "vit-b-16": PAPER_CLIP | {"architecture": "ViT-B-16-quickgelu", "pretrained": "openai"},
    "llama-3.2-3b": PAPER_LLAMA | {"seed_model": "meta-llama/Llama-3.2-3B"},
    "llama-3.1-8b": PAPER_LLAMA | {"seed_model": "meta-llama/Llama-3.1-8B", "gradient_checkpointing": True},  # for 80 GB
    # The embedded vision default: a CLIP small enough to train here, on drawn letters (metamoe/data/glyphs/).
    "glyph-clip": {
        "kind": "clip", "data": "glyphs", "architecture": "glyph-clip", "pretrained": "", "template": "{}", "resize": 32, "flip": False,
        "train_size": 500, "validation_size": 150, "test_size": 300, "public_size": 6000, "candidates": 480, "proxies": 80,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 6, "expert_lr": 1e-3, "expert_batch": 16, "warmup_steps": 0,
        "optimizer": "adamw", "weight_decay": 0.0, "final_epochs": 2, "final_batch": 32, "lambda_lr": 1e-3, "lambda_init": 1.0,
        # of 1e-5, 1e-4 and 1e-3: the best average accuracy on the validation parts of seed 0 (README)
        "final_lr": {"metamoe": 1e-5, "flexolmo": 1e-3, "btx": 1e-4, "unrestricted": 1e-3},
    },
    "smollm2-135m": {
        "kind": "text", "data": "bigbench", "optimizer": "adamw", "weight_decay": 0.0, "embed": "prompt",
        "loss": "answer", "answers": "text", "scoring": "likelihood",
        "train_size": 400, "validation_size": 80, "test_size": 200, "public_size": 5000,
        "candidates": 900, "proxies": 150, "max_length": 256,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 4, "expert_lr": 5e-4, "expert_batch": 8, "warmup_steps": 10,
        "final_epochs": 1, "final_batch": 16, "lambda_lr": 1e-3, "lambda_init": 1.0,
        # of 1e-4 (the paper's, also on a tie) and 1e-3: the better average accuracy on the validation parts of seed 0 (README)
        "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
    },
}
