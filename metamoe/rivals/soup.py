"""ModelSoup: one expert, the mean of the clients' weight updates."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from metamoe.errors import UserError
from metamoe.rundir import write_json


def merge(uploads, folder):
    """Write the soup of the uploads into `folder`, in the form of a client's expert."""
    experts = [upload.expert for upload in uploads]
    adapters = ["scaling" in next(iter(expert.values())) for expert in experts]
    if any(adapters) != all(adapters):
        other = uploads[adapters.index(not adapters[0])]
        kinds = "adapters or FFN weights, not both"
        raise UserError(f"client {other.client}: sent another kind than {uploads[0].client}: {kinds}")
    if not adapters[0]:
        tensors = {f"{ffn}.{key}": t for ffn, own in average(experts).items() for key, t in own.items()}
        save_file(tensors, folder / "ffn.safetensors")
        return
    soup, tensors = average_lora(experts), {}
    rank = next(A.shape[0] for A, _ in soup.values())
    for module, (A, B) in soup.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    config = {"peft_type": "LORA", "task_type": None, "bias": "none", "target_modules": sorted(soup)}
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter" / "adapter_config.json", config | {"r": rank, "lora_alpha": rank})


def average(experts):
    """The mean of full FFN weights."""
    soup = {}
    for ffn, first in experts[0].items():
        soup[ffn] = {key: torch.stack([expert[ffn][key] for expert in experts]).mean(0) for key in first}
    return soup


def average_lora(experts):
    """{linear's path: (A (R, d_in), B (d_out, R))}, B A the mean of the experts' scaling B_p A_p, exactly.

    An expert that leaves a linear out counts as 0 there. R is the same for all linears: zeros fill up.
    """
    soup = {}
    for expert in experts:
        for ffn, own in expert.items():
            for key in (key for key in own if key.endswith(".lora_A")):
                linear = key.removesuffix(".lora_A")
                B = own[f"{linear}.lora_B"] * (own["scaling"] / len(experts))
                parts = soup.setdefault(f"{ffn}.{linear}", ([], []))
                parts[0].append(own[key])
                parts[1].append(B)
    soup = {module: (torch.cat(A), torch.cat(B, 1)) for module, (A, B) in soup.items()}
    rank = max(len(A) for A, _ in soup.values())
    return {
        module: (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A))))
        for module, (A, B) in soup.items()
    }
