#!/usr/bin/env bash
# The whole job, end to end. No arguments: the embedded demo, task movie_tagging, on a CPU.
#
#   --tasks "a b" | all        tasks to run                               (movie_tagging)
#   --llama_model_path DIR     a real model; needs --data_dir too         (the demo's model)
#   --data_dir DIR             holds <task>/user_base_LLM.json, ...       (data/demo)
#   --output_dir DIR           results go to DIR/<task>/                  (output/demo; output with a real model)
#   --encoder NAME             embeds histories in stage 2                (the demo's model; DeBERTa-v3-large)
#   --seed N                   run seed                                   (0)
#   --until STEP               stop after this step                       (postprocess)
#
# Each step is printed before it runs and timed after; steps that finished under the same command are skipped.
set -euo pipefail
CALLED_FROM="$PWD"
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

ALL_TASKS="citation movie_tagging news_headline product_rating scholarly_title tweet_paraphrase"
tasks=movie_tagging model="" data="" output="" encoder="" seed=0 until=postprocess

usage() { sed -n '2,13s/^# \{0,1\}//p' "$ROOT/reproduce.sh"; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$CALLED_FROM/$1" ;; esac; }

while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --tasks | --llama_model_path | --data_dir | --output_dir | --encoder | --seed | --until)
            [ $# -ge 2 ] || { echo "reproduce.sh: $1 needs a value" >&2; exit 2; } ;;
        *) echo "reproduce.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    case "$1" in
        --tasks) tasks="$2" ;;
        --llama_model_path) model="$(absolute "$2")" ;;
        --data_dir) data="$(absolute "$2")" ;;
        --output_dir) output="$(absolute "$2")" ;;
        --encoder) encoder="$2" ;;
        --seed) seed="$2" ;;
        --until) until="$2" ;;
    esac
    shift 2
done
[ "$tasks" = all ] && tasks="$ALL_TASKS"

# The demo's model is a thousand times smaller than the published ones and learns at a larger rate; its answers are short.
if [ -z "$model" ]; then
    model=data/demo/model
    data="${data:-data/demo}" output="${output:-output/demo}" encoder="${encoder:-data/demo/model}"
    training=(--lr 5e-3) answers=(--max_gen_len 48 --k_list 1) history=(--train_gen_len 48) clusters=16
    attack=(--max_records 20)
else
    [ -n "$data" ] || { echo "reproduce.sh: --llama_model_path needs --data_dir" >&2; exit 2; }
    output="${output:-output}" encoder="${encoder:-microsoft/deberta-v3-large}"
    training=() answers=() history=() attack=() clusters=50
fi

install_requirements requirements.txt
cd "$ROOT"

# step NAME COMMAND...: runs a stage unless it finished under the same command and all steps before it did too.
step() {
    local name="$1" mark="$out/.steps/$1" started=$SECONDS
    shift
    [ "$stopped" = no ] || return 0
    [ "$name" != "$until" ] || stopped=yes
    if [ "$fresh" = no ] && [ "$(cat "$mark" 2> /dev/null)" = "$*" ]; then
        echo "[$task] $name: finished before, skipped"
        return
    fi
    fresh=yes
    echo "[$task] $name: python $*"
    "$PY" "$@"
    mkdir -p "$out/.steps"
    printf '%s' "$*" > "$mark"
    echo "[$task] $name: $((SECONDS - started)) s"
}

for task in $tasks; do
    out="$output/$task" fresh=no stopped=no
    data_options=(--task_name "$task" --data_dir "$data/$task")
    model_options=("${data_options[@]}" --llama_model_path "$model" --seed "$seed")
    adapted=("${model_options[@]}" --lora_ckpt "$out/task-base_LLM" --anchor_selection_dir "$out/anchor_selection")
    step task_lora task_lora.py "${model_options[@]}" "${training[@]}" "${answers[@]}" --output_dir "$out/task-base_LLM"
    step history_anchor history_anchor.py "${data_options[@]}" --encoder "$encoder" --k "$clusters" \
        --candidate_path "$data/$task/user_anchor_candidate.json" --output_dir "$out/anchor_selection"
    step train_anchor_peft train_anchor_peft.py "${adapted[@]}" "${training[@]}" "${history[@]}" \
        --output_dir "$out/Anchor_PEFT/LoRA"
    step lora_composition_evo lora_composition_evo.py "${adapted[@]}" "${answers[@]}" "${history[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" --n_sim 3 --opt_type cma --opt_budget 10 --sim_penalty 0.1 \
        --output_dir "$out/LoRA-Composition-evo"
    step mia mia.py "${model_options[@]}" --lora_ckpt "$out/task-base_LLM" --anchor_dir "$out/Anchor_PEFT/LoRA" \
        --n_sim 3 "${attack[@]}" --exp_dir "$out/LoRA-Composition-evo"
    step postprocess postprocess.py "${data_options[@]}" --output_dir "$out/LoRA-Composition-evo"
    [ "$fresh" = yes ] || [ ! -f "$out/summary.md" ] || cat "$out/summary.md"
done
