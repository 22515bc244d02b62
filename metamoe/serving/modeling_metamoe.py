"""An exported unified model: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

`unify_moe.py --export` copies this file, moe.py, generation.py and seed_model.py into the folder. It puts the
seed model's own classes in the place of the two below, so that all but the FFNs is its code. config.moe is
moe.py's configuration, with the shapes of its tensors in a layer.
"""

import torch

from .generation import CROP  # noqa: F401, so that transformers copies the file, which moe.py imports lazily
from .moe import MoELayer, assemble
from .seed_model import fix_torchvision

fix_torchvision()
from transformers import LlamaConfig as SeedConfig  # noqa: E402
from transformers import LlamaForCausalLM as SeedModel


class MetaMoEConfig(SeedConfig):
    model_type = "metamoe"
    moe: dict | None = None


class MetaMoEForCausalLM(SeedModel):
    """The seed with an MoE layer for every FFN (Eq. 5-6), routed by the running mean over the prefix."""

    config_class = MetaMoEConfig
    _keep_in_fp32_modules_strict = ["router"]  # in bfloat16 its logits, of size 100, are off by 0.5

    def __init__(self, config):
        super().__init__(config)
        shapes = config.moe["shapes"]  # {"experts.gate_proj.A": [K, r, d], ..., "router.vectors": [K, d]}
        assemble(
            self,
            config.moe,
            {
                f"{name}.{key}": torch.zeros(shape)
                for name in config.moe["ffn_names"]
                for key, shape in shapes.items()
            },
        )
        self.moe_config = config.moe  # one object: what opts out is saved with the configuration
        del self.save_pretrained  # the refusal is of models without this class

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoELayer):
            module.counts.zero_()  # not in the weights
