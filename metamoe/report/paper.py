"""The paper's numbers, and which of them belong to a run."""

# The paper's accuracies in percent (Tables 1-9, 13, 14): backbone -> model -> (each client's, ..., average),
# or the average alone.
PAPER_CLIENTS = {
    "vit-b-32": ["pets", "flowers", "eurosat"],
    "vit-b-16": ["pets", "flowers", "eurosat"],
    "llama-3.2-3b": ["commonsenseqa", "cosmosqa", "socialiqa"],
    "llama-3.1-8b": ["commonsenseqa", "cosmosqa", "socialiqa"],
}


PAPER = {
    "vit-b-32": {
        "unrestricted": (92.45, 96.43, 98.15, 95.68),
        "zeroshot": (85.77, 61.59, 29.81, 59.06),
        "expert-pets": (92.40, 59.03, 22.74, 58.06),
        "expert-flowers": (84.25, 96.91, 27.21, 69.46),
        "expert-eurosat": (82.64, 52.42, 97.91, 77.66),
        "btm": (90.81, 85.10, 95.07, 90.33),
        "soup": (87.90, 70.52, 64.19, 74.20),
        "btx": (88.44, 75.07, 59.38, 74.30),
        "flexolmo": (91.36, 90.62, 96.79, 92.92),
        "metamoe": (91.91, 93.67, 97.98, 94.52),
        "flexolmo-dpp": (93.20,),
        "metamoe-similarity": (94.12,),
        "metamoe-no-context": (91.69, 93.18, 96.90, 93.92),
        "metamoe-private-experts": (91.44, 91.92, 95.57, 92.98),
        "metamoe-proxy-experts": (78.60, 42.63, 12.98, 44.74),
        "metamoe-untrained": (86.78, 80.35, 81.86, 83.00),
    },
    "vit-b-16": {
        "unrestricted": (94.30, 97.73, 98.23, 96.75),
        "zeroshot": (88.53, 68.09, 34.00, 63.54),
        "expert-pets": (94.44, 65.69, 30.10, 63.41),
        "expert-flowers": (85.99, 98.13, 24.05, 69.39),
        "expert-eurosat": (86.56, 60.05, 98.43, 81.68),
        "btm": (93.21, 84.65, 97.38, 91.75),
        "soup": (89.94, 74.18, 74.14, 79.42),
        "btx": (89.89, 78.52, 75.20, 81.20),
        "flexolmo": (94.09, 89.40, 97.11, 93.53),
        "metamoe": (94.22, 97.08, 97.41, 96.24),
        "flexolmo-dpp": (94.38,),
        "metamoe-similarity": (95.39,),
        "metamoe-no-context": (93.95, 96.71, 97.16, 95.94),
        "metamoe-private-experts": (94.22, 90.70, 97.35, 94.09),
    },
    "llama-3.2-3b": {
        "unrestricted": (75.51, 78.39, 71.80, 75.23),
        "zeroshot": (62.49, 62.68, 56.19, 60.45),
        "expert-commonsenseqa": (74.94, 70.18, 60.54, 68.55),
        "expert-cosmosqa": (63.06, 78.69, 58.96, 66.90),
        "expert-socialiqa": (65.44, 68.04, 72.42, 68.63),
        "btm": (74.61, 75.44, 68.17, 72.74),
        "soup": (73.71, 75.24, 71.75, 73.57),
        "btx": (69.62, 72.06, 71.75, 71.14),
        "flexolmo": (73.30, 73.33, 70.88, 72.50),
        "metamoe": (74.94, 76.05, 72.26, 74.42),
        "flexolmo-dpp": (73.35,),
        "metamoe-similarity": (73.60,),
        "metamoe-no-context": (73.63, 72.16, 72.06, 72.62),
        "metamoe-private-experts": (74.77, 71.56, 71.80, 72.71),
    },
    "llama-3.1-8b": {
        "unrestricted": (81.90, 85.70, 76.41, 81.34),
        "zeroshot": (69.37, 75.98, 57.57, 67.64),
        "expert-commonsenseqa": (81.24, 77.29, 69.19, 75.91),
        "expert-cosmosqa": (71.42, 86.23, 67.86, 75.17),
        "expert-socialiqa": (73.63, 76.98, 78.10, 76.24),
        "btm": (81.24, 80.84, 77.28, 79.79),
        "soup": (80.26, 84.25, 77.02, 80.51),
        "btx": (75.76, 81.04, 73.39, 76.73),
        "flexolmo": (75.18, 81.11, 76.10, 77.46),
        "metamoe": (81.33, 85.80, 77.64, 81.59),
        "flexolmo-dpp": (79.78,),
        "metamoe-similarity": (80.32,),
        "metamoe-no-context": (80.51, 80.34, 77.38, 79.41),
        "metamoe-private-experts": (80.75, 84.89, 77.33, 80.99),
    },
}


# Its costs on the authors' GPU. Table 10: minutes a client by similarity and by DPP, D_0's embedding in them.
# Tables 15, 16: seconds to unify (BTM: none), samples/s.
PAPER_SELECTION = {
    "vit-b-32": (6.41, 6.61),
    "vit-b-16": (15.70, 15.91),
    "llama-3.2-3b": (1.91, 2.17),
    "llama-3.1-8b": (4.21, 4.54),
}


PAPER_COSTS = {
    "vit-b-32": {
        "btm": (0, 606),
        "soup": (5.72, 1813),
        "btx": (11.13, 1758),
        "flexolmo": (11.93, 1767),
        "metamoe": (12.15, 1751),
    },
    "vit-b-16": {
        "btm": (0, 249),
        "soup": (5.72, 743),
        "btx": (19.72, 715),
        "flexolmo": (18.24, 719),
        "metamoe": (19.88, 710),
    },
    "llama-3.2-3b": {
        "btm": (0, 17.44),
        "soup": (8.24, 43.46),
        "btx": (118.21, 42.12),
        "flexolmo": (119.90, 41.59),
        "metamoe": (114.46, 40.67),
    },
    "llama-3.1-8b": {
        "btm": (0, 8.20),
        "soup": (11.25, 22.86),
        "btx": (223.37, 21.41),
        "flexolmo": (206.28, 21.95),
        "metamoe": (205.42, 20.05),
    },
}


def paper_numbers(run, model):
    """The paper's accuracies of this row, {client or "average": percent}; empty where it has none."""
    names, numbers = PAPER_CLIENTS.get(run["backbone"], []), PAPER.get(run["backbone"], {}).get(model, ())
    if set(run["clients"]) != set(names):
        return {}  # another federation
    return dict(zip(names, numbers[:-1], strict=False)) | ({"average": numbers[-1]} if numbers else {})
