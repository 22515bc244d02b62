"""The interface that the stages use: features, routing vectors, experts; the choice of device and dtype."""

import contextlib
import warnings

import numpy as np
import torch

from metamoe.backbones.distributed import ALONE, processes, sharding
from metamoe.errors import UserError
from metamoe.serving.seed_model import fix_torchvision


def import_transformers():
    fix_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()  # loading weights takes only a second or two
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's, harmless
    return transformers


def machine(args):
    """(device, dtype) of a stage's flags."""
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, device)


def pick_device(name="auto"):
    """The torch device of a name; under `accelerate launch` this process's own."""
    device = check_device(name)
    return getattr(processes(device.type), "device", device)


def check_device(name):
    """The torch device of a name; UserError where it is none that the stages run on, or is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:NUMBER")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UserError(f"--device {name}: there are {there} CUDA devices here, counted from 0; or use cpu")
    return device


def pick_dtype(name, device):
    """The torch dtype of a name. auto: bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        cuda = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported()
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name) if isinstance(name, str) else name


def dtype_name(dtype):
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


class Backbone:
    """What a language model and a CLIP share. Each kind adds these methods:

    embed(records, label, skip, every): yields (indices, features (b, d) float32) batch by batch. The batches
        are always the same; after the first `skip` each `every`-th is embedded.
    prompt_batches(model, records, label): yields (indices, token mask (B, T), what runs the batch).
    losses(model, records, classes, batch_size, steps, seed): yields each step's loss with its graph. Under
        `accelerate launch` it is this process's part: the sum over processes is the mean over the batch.
    sample_losses(model, records, classes, batches, seed): yields for each batch of indices the sum of its
        samples' own losses, a text's a mean over its own tokens.
    scores(model, records, label, scoring): a list of float64 arrays, one a record.
    public_classes(folder): the class names of RUN/public/ that an image classifier is trained on.

    Attributes: source, device, dtype, model (the frozen seed model), ffn_names (module paths of its FFNs),
    ffn_linears (names of the linears in each), width (d of features and routing vectors), unreadable
    ((index, message) of the images that were left out), seconds (spent waiting for decoded images).
    """

    def autocast(self):
        # Enter it anew at every step: its cache of cast weights would hide the optimiser's updates.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def shared_embed(self, records, label="embedding", skip=0):
        """As embed, with the unreadable so far. Processes share the batches, each gets the results of all."""
        state, gather = processes(), list
        if state is not ALONE:
            from accelerate.utils import gather_object as gather
        batches = self.embed(records, label, skip=skip + state.process_index, every=state.num_processes)
        mine = ((*batch, state.process_index, list(self.unreadable)) for batch in batches)
        unreadable = {}  # process -> its list
        while found := [batch for batch in gather([next(mine, None)]) if batch]:
            for indices, values, process, bad in found:
                unreadable[process] = bad
                yield indices, values, sum(unreadable.values(), [])

    def features(self, records, label="embedding"):
        """Seed-model embeddings (n, d) float32 of a client's records; UserError if one cannot be read."""
        out, unreadable = np.empty((len(records), self.width), np.float32), ()
        for batch, values, found in self.shared_embed(records, label):
            out[batch] = values
            unreadable = found
        if unreadable:
            message = f"private sample {unreadable[0][1]}: repair it or take it out of the client's data"
            raise UserError(message)
        return out

    def routing_vectors(self, model, records, label="routing vectors"):
        """(L, d) float32: mean over samples of the token mean of each FFN's input.

        The tokens are an image's patches or a text's prompt, as in the router's context.
        """
        return self.input_means(model, records, label)[0]

    def input_means(self, model, records, label):
        """(the routing vectors (L, d), mean over samples of the length of their token mean (L,))."""

        def with_length(layer, means):
            return torch.cat([means, means.norm(dim=1, keepdim=True)], 1)

        means = self.input_sums(model, records, label, self.width + 1, with_length) / len(records)
        means = means.float()
        return means[:, :-1].contiguous(), means[:, -1]

    @torch.no_grad()
    def input_sums(self, model, records, label, width, of):
        """The sum over samples of of(layer, token means (b, d)), which is (b, width): (L, width) float64."""
        state = processes()
        # Sharded weights come together only where all processes run the same layers.
        dealt = state.num_processes > 1 and not sharding()
        share = (state.process_index, state.num_processes) if dealt else (0, 1)
        sums = torch.zeros(len(self.ffn_names), width, dtype=torch.float64)
        for _, means in self.sample_vectors(model, records, label, *share):
            for layer, own in enumerate(means.unbind(1)):  # (b, d)
                sums[layer] += of(layer, own).sum(0).double().cpu()
        if dealt:
            from accelerate.utils import reduce

            sums = reduce(sums.to(self.device), "sum").cpu()
        return sums

    @torch.no_grad()
    def sample_vectors(self, model, records, label, first=0, every=1):
        """Yield (indices, the token mean of each FFN's input, (b, L, d) float32) batch by batch.

        first, every: the batches that are computed.
        """
        layers = [unwrap(model).get_submodule(name) for name in self.ffn_names]
        found = {}

        def keep(ffn, inputs):
            found[ffn] = masked_mean(inputs[0].float(), tokens)  # (b, d)

        with contextlib.ExitStack() as hooks:
            for ffn in layers:
                hooks.enter_context(ffn.register_forward_pre_hook(keep))
            for number, (indices, mask, forward) in enumerate(self.prompt_batches(model, records, label)):
                tokens = mask  # the hooks read it
                if number % every == first:
                    with self.autocast():
                        forward()
                    yield indices, torch.stack([found[ffn] for ffn in layers], 1)

    # --- experts

    def add_lora(self, rank, alpha, seed, fixed_a=False):
        """The model with new PEFT LoRA factors on the FFN linears; only they train. seed: the random seed.

        fixed_a: only the factors B train; the random A are the same for all who have the seed.
        """
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        targets = [f"{ffn}.{linear}" for ffn in self.ffn_names for linear in self.ffn_linears]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type=self.task_type)
        model = get_peft_model(self.model, config)
        if fixed_a:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return model

    def train_full_ffn(self):
        """The model with trainable FFN weights, in float32."""
        for ffn in self.ffn_names:
            self.model.get_submodule(ffn).float().requires_grad_(True)
        return self.model

    def with_expert(self, expert):
        """The model with one expert (uploads.read_expert): LoRA factors through PEFT, or whole FFNs."""
        if not any("scaling" in own for own in expert.values()):
            state = {f"{ffn}.{key}": tensor for ffn, own in expert.items() for key, tensor in own.items()}
            self.model.load_state_dict(state, strict=False)
            return self.model.eval()
        from peft import LoraConfig, get_peft_model

        factors = {}  # {linear: (A, B, scale of B A)}
        for ffn, own in expert.items():
            for key in (key for key in own if key.endswith(".lora_A")):
                linear = key.removesuffix(".lora_A")
                factors[f"{ffn}.{linear}"] = own[key], own[f"{linear}.lora_B"], own["scaling"]
        ranks = {linear: len(A) for linear, (A, _, _) in factors.items()}
        alphas = {linear: scale * len(A) for linear, (A, _, scale) in factors.items()}
        options = {"target_modules": list(factors), "rank_pattern": ranks, "alpha_pattern": alphas}
        model = get_peft_model(self.model, LoraConfig(task_type=self.task_type, **options))
        for linear, (A, B, _) in factors.items():
            adapted = unwrap(model).get_submodule(linear)
            adapted.lora_A["default"].weight.data.copy_(A)
            adapted.lora_B["default"].weight.data.copy_(B)
        return model.eval()


def unwrap(model):
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def masked_mean(values, mask):
    """Mean over tokens (B, T, d), (B, T) -> (B, d)."""
    weight = mask[..., None].to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1)


def chunks(items, size):
    """Slices of `size` items each, the last of what is left."""
    return [items[start : start + size] for start in range(0, len(items), size)]
