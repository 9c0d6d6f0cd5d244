#!/usr/bin/env bash
# The main job on a laptop, with the commands that a cluster user calls: corpus, tokenizer, tokens, both phases of
# training, a Hugging Face model, a sample of its text, a table. To resume an interrupted training, run it again.
set -euo pipefail
cd "$(dirname "$0")/.."

data=data/quickstart
run=runs/quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"

step() { printf '\n== %s\n$%s\n' "$1" "$(printf ' %q' "${@:2}")"; "${@:2}"; }

if [ ! -e "$data/done" ]; then
    step "Corpus: SymPy's source (code) and its docstrings (prose)" \
        python scripts/quickstart_corpus.py "$data"
    step "Tokenizer" \
        jetmoe data tokenizer "$data/code.train.jsonl" "$data/prose.train.jsonl" \
        --vocab-size 4096 --output "$data/tokenizer" --overwrite
    for name in code.train code.heldout prose.train prose.heldout; do
        step "Tokens of $name" \
            jetmoe data tokenize "$data/$name.jsonl" --output "$data/$name" --tokenizer "$data/tokenizer" \
            --workers 2 --overwrite
    done
    touch "$data/done"
fi
step "Training: both phases" \
    scripts/torchrun_local.sh 2 configs/quickstart/run.yaml
checkpoint=$(find "$run/checkpoints" -regex '.*/tokens_[0-9]+' | sort -V | tail -n 1)
model=$run/hf/${checkpoint##*/}
rm -rf "$model"
step "Hugging Face model" jetmoe convert to-hf "$checkpoint" "$model"
step "A sample, by plain transformers" python scripts/sample_hf.py "$model" "def read_file(path):"
step "The run" jetmoe report "$run"
printf '\nCharts for a browser: %s\n' "$run/report.html"
