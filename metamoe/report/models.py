"""The models of a run that evaluate.py scores: their order in the tables, their folders and their titles."""

from metamoe.errors import UserError
from metamoe.methods import METHODS, main_rows
from metamoe.methods import title as method_title
from metamoe.rundir import check_name, check_whole, settings_of
from metamoe.uploads import read_upload, upload_variant

ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]


def title(row, run):
    """A row's name in the tables."""
    if row == "zeroshot":
        return "ZeroShot"
    if not row.startswith("expert-"):
        return method_title(row)
    name = row.removeprefix("expert-")
    number = run["clients"].index(name)
    return f"Expert {ROMAN[number] if number < len(ROMAN) else number + 1} ({name})"


def list_models(run_dir, run, only=None):
    """{row: folder, None for the seed model} of all models or `only` these; UserError where one is not."""
    rows = table_order(run_dir, run)
    for row in only or []:
        if row not in rows:
            there = f"there is no such model in {run_dir}; there are {', '.join(rows)}"
            raise UserError(f"--models {row}: {there}")
    folders = {}
    for row in rows:
        if only and row not in only:
            continue
        folders[row] = None if row == "zeroshot" else run_dir / "moe" / row
        if row.startswith("expert-"):
            name = row.removeprefix("expert-")
            folders[row] = run_dir / "clients" / name / "upload" / scored_variant(run_dir, run)
            read_upload(run_dir, run, name, folders[row].name)  # what is wrong with it shows at once
        elif folders[row]:
            check_whole(folders[row], "make it again with unify_moe.py")
    return folders


def table_order(run_dir, run):
    """The upper bound, ZeroShot, the clients' experts, the other methods, then all else that was made."""
    made = [path.name for path in sorted((run_dir / "moe").glob("[!.]*")) if (path / "done.json").exists()]
    methods = [row for row in main_rows() if row in made]
    bounds = [row for row in methods if METHODS[row].samples == "private"]
    rows = [*bounds, "zeroshot", *(f"expert-{name}" for name in run["clients"]), *methods, *made]
    return list(dict.fromkeys(rows))


def scored_variant(run_dir, run):
    """The upload that the clients' experts are taken from: what BTM combines, else what all have."""
    btm = run_dir / "moe" / "btm" / "done.json"
    if btm.exists():
        return check_name(f"{btm}: variant", settings_of(btm.parent).get("variant"))
    private = upload_variant(METHODS["btm"].data, METHODS["btm"].selection)
    made = []
    for name in run["clients"]:
        manifests = (run_dir / "clients" / name / "upload").glob("[!.]*/manifest.json")
        made.append({path.parent.name for path in manifests})
    common = set.intersection(*made)
    return private if private in common or not common else min(common)
