"""ModelSoup: one expert, the mean of the clients' weight updates."""

import json

import torch
from safetensors.torch import save_file

from metamoe.rundir import write_json
from metamoe.uploads import read_expert


def merge(uploads, folder):
    """Write the soup of the uploads into `folder`, in the form of a client's upload."""
    save_soup(average([read_expert(upload) for upload in uploads]), uploads[0], folder)


def average(experts):
    """ModelSoup: the mean of the experts' weights. The mean of products B_p A_p is one LoRA expert of rank K
    r, exactly."""
    soup = {}
    for ffn, first in experts[0].items():
        soup[ffn] = {}
        for key in first:
            tensors = [expert[ffn][key] for expert in experts]
            if key == "scaling":
                soup[ffn][key] = 1.0
            elif key.endswith("lora_A"):
                soup[ffn][key] = torch.cat(tensors)  # (K r, d_in)
            elif key.endswith("lora_B"):
                # (d_out, K r)
                soup[ffn][key] = torch.cat(
                    [
                        t * expert[ffn]["scaling"] / len(experts)
                        for t, expert in zip(tensors, experts, strict=True)
                    ],
                    1,
                )
            else:
                soup[ffn][key] = torch.stack(tensors).mean(0)
    return soup


def save_soup(soup, upload, folder):
    """The soup as what a client uploads: a PEFT adapter, or ffn.safetensors."""
    if (upload / "ffn.safetensors").exists():
        save_file(
            {f"{ffn}.{key}": t for ffn, expert in soup.items() for key, t in expert.items()},
            folder / "ffn.safetensors",
        )
        return
    tensors = {
        f"base_model.model.{ffn}.{key}.weight": t.contiguous()
        for ffn, expert in soup.items()
        for key, t in expert.items()
        if key != "scaling"
    }
    rank = next(t for key, t in tensors.items() if "lora_A" in key).shape[0]
    config = json.loads((upload / "adapter" / "adapter_config.json").read_text()) | {
        "r": rank,
        "lora_alpha": rank,
    }
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter" / "adapter_config.json", config)
