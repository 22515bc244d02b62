"""The flags of select_proxies.py: what a run is, which run.json keeps for every later stage, and its rule."""

from metamoe.errors import UserError
from metamoe.flag_values import count, not_negative, number, positive_int, random_seed
from metamoe.presets import PRESETS
from metamoe.run_settings import known_clients

WEIGHTED = ("dpp", "dpp-all")  # the rules that weigh relevance against diversity


def add_client_flags(parser):
    """Who takes part, and where the data are."""
    flag = parser.add_argument
    known = "; ".join(f"{name}: {' '.join(known_clients(name))}" for name in PRESETS)
    default = "default: those of --client NAME=PATH, else the backbone's, of smollm2-135m the first three"
    clients = f"clients of the run, or how many of the backbone's ({default}; {known})"
    flag("--clients", nargs="+", metavar="NAME", help=clients)
    own = (
        "NAME=PATH, once for each: a client of the run with data of your own, JSON lines with `prompt`, "
        "`choices`, `answer` (a choice's text, or its index from 0) or with `prompt`, `response`; for CLIP a "
        "folder CLASS/IMAGE. NAME: select for this one alone"
    )
    flag("--client", action="append", metavar="NAME[=PATH]", help=own)
    join = "add this client to a run that is there and select its proxies; the others' work stays"
    flag("--join", metavar="NAME[=PATH]", help=join)
    agreement = "take part under the coordinator's run.json: as the --client of this party, or as the server"
    flag("--agreement", metavar="FILE", help=agreement)
    agree = "make the agreement of these clients, whose data stay with them, for all parties: RUN/run.json"
    flag("--make-agreement", nargs="+", metavar="NAME", help=agree)
    skip = "leave out and count what is wrong in own data, instead of ending at the first of it"
    flag("--skip-bad-records", action="store_true", help=skip)
    root = (
        "folder of the paper's datasets: oxford_pets/, oxford_flowers/, eurosat/ in CoOp's layout; "
        "commonsenseqa/, cosmosqa/, socialiqa/, alpaca/"
    )
    flag("--data-root", metavar="DIR", help=root)
    copy = "a client's copy of its dataset: a folder, or a Hugging Face dataset (hub id or local copy)"
    flag("--dataset", nargs="+", metavar="NAME=SOURCE", help=copy)
    public = (
        "public set. Text: JSON lines as for --client, or Alpaca (hub id, local copy, alpaca_data.json); "
        "CLIP: ImageNet, a folder CLASS/IMAGE or a Hugging Face dataset (default: the backbone's own)"
    )
    flag("--public", metavar="PATH", help=public)


def add_setting_flags(parser):
    """Seed model, sizes and losses: kept in run.json, the same in every stage."""
    flag = parser.add_argument
    presets = f"seed model and its presets: {', '.join(PRESETS)} (default: the run's, else smollm2-135m)"
    flag("--backbone", help=presets)
    model = "hub id, local folder or (CLIP) checkpoint of another seed model than the backbone's own"
    flag("--seed-model", "--pretrained", help=model)
    architecture = "of a CLIP, as open_clip names it: ViT-B-32 has plain GELU (default: the preset's)"
    flag("--architecture", metavar="NAME", help=architecture)
    flag("--seed", type=random_seed, help="the random seed of splits and of every random choice (default: 0)")
    train = (
        "private training samples a client (default: the preset's, like all below; 0, also below: all; own "
        "data: default and 0 are 80/10/10 of it)"
    )
    flag("--train-size", type=count, help=train)
    flag("--validation-size", type=count, help="private validation samples a client")
    flag("--test-size", type=count, help="test samples a client")
    flag("--public-size", type=count, help="public samples, |D_0|")
    pool = "n: most relevant public samples that the DPP chooses from (0: all of them, no pre-filter)"
    flag("--candidates", "--pool", type=count, help=pool)
    flag("--proxies", type=count, help="m: proxies a client")
    flag("--rank", type=positive_int, help="the most LoRA rank of an expert, and train_expert.py's default")
    flag("--alpha", type=positive_int, help="LoRA alpha, train_expert.py's default")
    answers = (
        "language models, multiple choice: train on the answer's text, or list the choices in the prompt and "
        "train on the answer's letter"
    )
    flag("--answers", choices=["text", "letters"], help=answers)
    chat = (
        "records with `messages`: by the tokenizer's chat template, where it has one, or off: as plain text "
        "(default: auto)"
    )
    flag("--chat-template", choices=["auto", "off"], help=chat)
    longest = (
        "tokens of a text, prompt and answer; a longer prompt loses its beginning (default: the preset's)"
    )
    flag("--max-length", type=number(int, 8), metavar="TOKENS", help=longest)
    loss = (
        "language models: loss on the answer (router context: the prompt's mean) or on the whole text "
        "(context: the mean so far)"
    )
    flag("--loss", choices=["answer", "text"], help=loss)


def add_rule_flags(parser, rules):
    """How proxies are chosen."""
    flag = parser.add_argument
    rule = "rule that chooses the proxies; dpp-all: the DPP without the pre-filter (default: %(default)s)"
    flag("--selection", choices=rules, default="dpp", help=rule)
    weight = (
        "weight of relevance in the DPP: W 2 sum log r + log det L_S, from 0, diversity alone; 1 is Eq. 4, "
        "another W makes a selection RULE-wW, which later stages take with --selection (default: 1)"
    )
    flag("--relevance-weight", type=not_negative, default=1.0, metavar="W", help=weight)


def rule_settings(args):
    """{"selection": its folder}, with another weight than 1 also {"rule", "relevance_weight"}.

    UserError where the rule has no weight.
    """
    weight, rule = abs(args.relevance_weight), args.selection  # abs: of -0.0
    if weight == 1:
        return {"selection": rule}
    if rule not in WEIGHTED:
        rules = " or ".join(WEIGHTED)
        raise UserError(f"--relevance-weight {weight:g}: goes with --selection {rules}: {rule} has no weight")
    return {"selection": f"{rule}-w{weight:.15g}", "rule": rule, "relevance_weight": weight}
