#!/usr/bin/env bash
# The whole job, end to end. No arguments: the embedded demo, task movie_tagging, on a CPU.
#
#   --tasks a,b | all          tasks to run                               (movie_tagging)
#   --task_file FILE           a task of your own in place of --tasks; its data are in --data_dir or beside the file
#   --llama_model_path NAME    a real model: directory, GGUF file, name of the hub; needs --data_dir (the demo's)
#   --data_dir DIR             holds <task>/user_base_LLM.json, ...       (data/demo)
#   --output_dir DIR           results go to DIR/<task>/                  (output/demo; output with a real model)
#   --encoder NAME             embeds histories in stage 2                (the demo's model; DeBERTa-v3-large)
#   --k N                      clusters of stage 2, so sharers at most    (16; the published 50 with a real model)
#   --seed N                   run seed                                   (0)
#   --methods prime | all      all: every baseline too, each attacked alike (prime)
#   --holdout SHARE            of sharers' items, held out for the controlled attack (0)
#   --as_published             every setting as in the published code (docs/stages.md); the demo keeps its rates
#   --processes N              processes of a step, on as many cores or GPUs (the demo: a core each, up to 4; 1)
#   --until STEP               stop after this step                       (postprocess)
#   --config FILE              options of the stages: presets/*.toml, or your own like them; several add up
#   --set STAGE.OPTION=VALUE   one of them, such as lora_composition_evo.opt_budget=30
#   --real                     a real model of 135 M parameters, with presets/small_real.toml, on a laptop
#   --git DIR                  with --real: the authors of this clone and their commit messages are the data
#
# Each step is printed before it runs and timed after. Steps that finished under the same command and with the same
# files to read (data, model, what the steps before made) are skipped; others make again what is stale, no more. Stage 2
# comes before stage 1: it is short, so a wrong --k or --encoder is told before the model trains.
set -euo pipefail
CALLED_FROM="$PWD"
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

tasks="" task_file="" model="" data="" output="" encoder="" k="" seed=0 methods=prime until=postprocess
holdout=0 processes="" published=() real=no clone=""

usage() { sed -n '2,24s/^# \{0,1\}//p' "$ROOT/reproduce.sh"; }
wrong() { echo "reproduce.sh: $1" >&2; exit 2; }
# closest WORD: the option that it is most like, if any is.
closest() {
    local pick='import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))'
    # shellcheck disable=SC2046 # options are words
    "${PYTHON:-python3}" -c "$pick" "$1" $(usage | grep -o '^  --[a-z_]*') 2> /dev/null || true
}
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$CALLED_FROM/${1#./}" ;; esac; }
# A name of the hub stays what it is: owner/model, and nothing lies there.
named() { if [ ! -e "$(absolute "$1")" ] && [[ "$1" =~ ^[[:alnum:]_][[:alnum:]_.-]*/[[:alnum:]_.-]+$ ]]; then echo "$1"; else absolute "$1"; fi; }

# Presets and --set; gives what is left of the command line in `words`, the options of a stage in `preset_STAGE`.
python="$PY" asked=("$@")
[ -x "$PY" ] || { python="${PYTHON:-python3}"; new_enough "$python"; }
settled="$(cd "$ROOT" && CALLED_FROM="$CALLED_FROM" "$python" -m presets.options "$@")" || exit 2
eval "$settled"
set -- ${words[@]+"${words[@]}"}

while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --as_published) published=(--as_published); shift; continue ;;
        --real) real=yes; shift; continue ;;
        --tasks | --task_file | --llama_model_path | --data_dir | --output_dir | --encoder | --k | --seed | --methods | --holdout \
            | --processes | --until | --git)
            [ $# -ge 2 ] || wrong "$1 needs a value" ;;
        *) near="$(closest "$1")"; wrong "there is no option $1${near:+; did you mean $near?} (--help lists all)" ;;
    esac
    case "$1" in
        --tasks) tasks="${2//,/ }" ;;
        --task_file) task_file="$(absolute "$2")" ;;
        --llama_model_path) model="$(named "$2")" ;;
        --data_dir) data="$(absolute "$2")" ;;
        --output_dir) output="$(absolute "$2")" ;;
        --git) clone="$(absolute "$2")" ;;
        --encoder) if [ -e "$2" ]; then encoder="$(absolute "$2")"; else encoder="$2"; fi ;;
        --k) k="$2" ;;
        --seed) seed="$2" ;;
        --methods) methods="$2" ;;
        --holdout) holdout="$2" ;;
        --processes) processes="$2" ;;
        --until) until="$2" ;;
    esac
    shift 2
done
cd "$ROOT"
case "$until" in
    task_lora | history_anchor | train_anchor_peft | lora_composition_evo | mia | postprocess) ;;
    *) wrong "--until names a step (task_lora, history_anchor, ...), not $until" ;;
esac
case "$methods" in prime | all) ;; *) wrong "--methods is prime or all, not $methods" ;; esac
# whole OPTION VALUE LEAST
whole() {
    local good=no
    case "$2" in *[!0-9]* | "") ;; *) [ "${#2}" -gt 9 ] || [ "$((10#$2))" -lt "$3" ] || good=yes ;; esac
    [ "$good" = yes ] || wrong "$1 is a whole number from $3, not $2"
}
[ -z "$processes" ] || whole --processes "$processes" 1
whole --seed "$seed" 0
[ -z "$k" ] || whole --k "$k" 3 # as many sharers are merged for a user
[[ "$holdout" =~ ^(0|0?\.[0-9]+)$ ]] || wrong "--holdout is a share from 0 to less than 1, not $holdout"

[ -z "$tasks" ] || [ -z "$task_file" ] || wrong "--tasks and --task_file: give one of them"
[ -z "$task_file" ] || data="${data:-$(dirname "$task_file")}"
[ "$real" = yes ] || [ -z "$clone" ] || wrong "--git goes with --real"
if [ "$real" = yes ]; then
    . presets/real.sh
elif [ -z "$model" ]; then
    model=data/demo/model
    data="${data:-data/demo}" output="${output:-output/demo}" encoder="${encoder:-data/demo/model}"
else
    [ -n "$data" ] || wrong "--llama_model_path needs --data_dir"
    [[ "$model" != /* || -e "$model" ]] || wrong "--llama_model_path $model: no such directory, and no name of the hub"
    output="${output:-output}" encoder="${encoder:-microsoft/deberta-v3-large}"
fi

known="" # the built-in tasks
for file in data/tasks/*.json; do file="${file##*/}" known+="${known:+ }${file%.json}"; done
if [ -n "$task_file" ]; then
    [ -f "$task_file" ] || wrong "--task_file $task_file: no such file"
    install_requirements requirements
    tasks="$("$PY" -m prime.users.tasks "$task_file")" || exit 2
    tasks="${tasks%% *}" # its name, in front of what its search asks
elif [ "$tasks" = all ]; then # that there are data of
    tasks=""
    for task in $known; do [ ! -d "$data/$task" ] || tasks+=" $task"; done
    [ -n "$tasks" ] || wrong "--tasks all: $data has none of ${known// /, }"
fi
tasks="${tasks:-movie_tagging}"

# A task of your own may have its data in the folder that is named, without one of its name.
folder_of() { if [ -n "$task_file" ] && [ ! -d "$data/$1" ]; then echo "$data"; else echo "$data/$1"; fi; }

# What is needed of a task, and which command makes it.
check_task() {
    local task="$1" folder which="--task_name $1" source="the official LaMP files" file
    local made="$which --lamp_dir DIR"
    folder="$(folder_of "$task")"
    if [ -n "$task_file" ]; then
        which="--task_file $task_file" source="a table of yours"
        made="$which --table FILE --user COLUMN --input COLUMN --target COLUMN --time COLUMN"
    else
        case " $known " in
            *" $task "*) ;;
            *) wrong "--tasks: $task is none of all, ${known// /, } (--task_file: your own)" ;;
        esac
    fi
    for file in user_base_LLM.json user_anchor_candidate.json test_100/user_test_100.json \
        test_100/user_test_100_label.json; do
        [ -f "$folder/$file" ] || wrong "$folder/$file is not there. From $source this makes it:
    python prepare_data.py $made --output_dir $folder"
    done
    [ -f "$folder/profile-id2text.json" ] || echo "[$task] prompts with a textual profile are left out. This adds them:
    python gen_profile.py $which --data_dir $folder     (--rule: without a model)" >&2
}
[ -n "${tasks// /}" ] || wrong "--tasks names no task"
for task in $tasks; do check_task "$task"; done

install_requirements requirements
[ "${#given[@]}" = 0 ] || CALLED_FROM="$CALLED_FROM" "$PY" -m presets.options --check "${asked[@]}" || exit 2
[ "${#told[@]}" = 0 ] || echo "${told[0]}"
if [ -z "$processes" ]; then
    processes=1
    if [ "$model" = data/demo/model ]; then # small, so a thread each: see prime/bank/cpu.py
        processes="$(env -u OMP_NUM_THREADS nproc 2> /dev/null || sysctl -n hw.ncpu 2> /dev/null || echo 1)"
        processes=$((processes < 4 ? processes : 4))
        echo "processes: $processes, by the cores (--processes)"
    fi
fi

# together COMMAND...: a stage in all processes, which share its users and give the files of one (docs/scaling.md).
# Nothing is sent between them: each is told its number.
together() {
    local rank pid code=0
    for ((rank = 0; rank < processes; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes "$PY" "$@" &
        running+=($!)
    done
    for pid in "${running[@]}"; do wait "$pid" || code=$?; done
    running=()
    return "$code"
}

# made_of COMMAND...: the command, and a digest of the files and folders it names, but for those it fills.
made_of() {
    local word paths=()
    for word in "${@:2:$#-3}"; do [ ! -e "$word" ] || paths+=("$word"); done
    case "$1" in mia.py | postprocess.py) paths+=("${@: -1}") ;; esac # a stage's output, which they add to
    echo "$*"
    "$PY" -m prime.runs.inputs "${paths[@]}"
}

# failed NAME CODE: ends the job; but the report is made without an attack that failed, and the job's exit code tells.
# A step may fail because a file of an earlier one is lost, so next time all of them look; not where it was stopped.
failed() {
    [ "$2" = 130 ] || rm -f "$out/.steps/"*
    case "$1-$2" in *-130) exit 130 ;; mia*) ;; *) exit "$2" ;; esac
    failure="$2" failures+=("[$task] $1")
    echo "[$task] $1: failed with exit code $2; the report is made without it" >&2
}

# step NAME COMMAND...: runs a stage unless it finished under the same command and read the same. The preset's options
# come before the last one, the folder, and win.
step() {
    local name="$1" mark="$out/.steps/$1" started=$SECONDS refresh=(--refresh) now run
    shift
    [ "$stopped" = no ] || return 0
    [ "$name" != "$until" ] || stopped=yes
    if [ "$1" != postprocess.py ]; then
        local preset="preset_${1%.py}[@]"
        set -- "${@:1:$#-2}" ${!preset+"${!preset}"} "${@: -2}"
    fi
    now="$(made_of "$@")"
    if [ -d "${@: -1}" ] && [ "$now" = "$(cat "$mark" 2> /dev/null)" ]; then
        echo "[$task] $name: finished before, skipped"
        return
    fi
    fresh=yes
    rm -f "$mark" "$out/.steps/postprocess" # the table is of all steps
    echo "[$task] $name: python $*"
    [ "$1" != postprocess.py ] || refresh=()
    case "$1" in history_anchor.py | postprocess.py) run=("$PY") ;; *) run=(together) ;; esac # those are short
    "${run[@]}" "$1" ${refresh[@]+"${refresh[@]}"} "${@:2}" || { failed "$name" $?; return 0; }
    mkdir -p "$out/.steps"
    echo "$now" > "$mark"
    echo "[$task] $name: $((SECONDS - started)) s"
}

# attack NAME FOLDER [OPTION...]: membership inference on what a stage put into $out/FOLDER.
attack() {
    local name="$1" folder="$2"
    shift 2
    step "$name" mia.py "${model_options[@]}" --lora_ckpt "$out/task-base_LLM" --anchor_dir "$out/Anchor_PEFT/LoRA" \
        "$@" --n_sim 3 --exp_dir "$out/$folder"
}

# Per-Pcs on the same sharers, attacked alike.
per_pcs() {
    step train_anchor_gate train_anchor_gate.py "${adapted[@]}" \
        --anchor_path "$out/Anchor_PEFT/LoRA" --output_dir "$out/Anchor_PEFT/gate"
    step lora_composition lora_composition.py "${adapted[@]}" \
        --gate_dir "$out/Anchor_PEFT/gate" --anchor_dir "$out/Anchor_PEFT/LoRA" \
        --n_sim 3 --topk 3 --recent_k 2000 --shared_ratio 1 --agg_temperature 1 --output_dir "$out/LoRA-Composition"
    attack mia_per_pcs LoRA-Composition --gate_dir "$out/Anchor_PEFT/gate" --skip_sharers
}

# PriME as published (factor rule, wide steps from zero, no single sharer may win), and LoraHub, searched alike: its
# objective is what differs.
other_searches() {
    local searched=(--n_sim 3 --opt_type cma --opt_budget 10 --as_published)
    local preset_lora_composition_evo=(${preset_alike[@]+"${preset_alike[@]}"})
    # On the same sharers, asked as they were trained.
    [ "${#published[@]}" != 0 ] || searched+=(--texts faithful --chat auto)
    step prime_published lora_composition_evo.py "${adapted[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" "${searched[@]}" --sim_penalty 0.1 --name prime_published \
        --output_dir "$out/LoRA-Composition-evo-published"
    attack mia_prime_published LoRA-Composition-evo-published --skip_sharers
    preset_lora_composition_evo=(${preset_lorahub[@]+"${preset_lorahub[@]}"})
    step lorahub lora_composition_evo.py "${adapted[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" "${searched[@]}" --objective nll --output_dir "$out/LoraHub"
    attack mia_lorahub LoraHub --skip_sharers
}

# baseline NAME FOLDER: what comes with the search of PriME, in a run of its own, so that it is attacked, too.
baseline() {
    step "$1" lora_composition_evo.py "${adapted[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" --n_sim 3 --baseline "$1" "${fitness[@]}" --output_dir "$out/$2"
    attack "mia_$1" "$2" --skip_sharers
}

# Training on the user's own history. OPPU merges nobody's adapter: attacked are the users' own records.
user_training() {
    step oppu train_user_peft.py --method oppu "${adapted[@]}" \
        --holdout "$holdout" --output_dir "$out/OPPU"
    attack mia_oppu OPPU --skip_sharers
    step mta train_user_peft.py --method mta "${adapted[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" --output_dir "$out/Merge-then-adapt"
    attack mia_mta Merge-then-adapt --skip_sharers
}

failure=0 failures=() running=()
trap 'kill ${running[@]+"${running[@]}"} 2> /dev/null || true; wait; exit 130' INT TERM # each ends what it writes
for task in $tasks; do
    out="$output/$task" fresh=no stopped=no
    link="$(find "$out/" -type l -print -quit 2> /dev/null || true)"
    [ -z "$link" ] || wrong "$link is a link; below $out there are to be folders and regular files only"
    # Citation learns cited titles but is tested by choices, so the search asks choices (published: cited titles).
    search="$("$PY" -m prime.users.tasks "${task_file:-$task}")"
    fitness=(--fitness "${search##* }")
    [ "${#published[@]}" = 0 ] || fitness=()
    folder="$(folder_of "$task")" which=(--task_name "$task")
    [ -z "$task_file" ] || which=(--task_file "$task_file")
    data_options=("${which[@]}" --data_dir "$folder" ${published[@]+"${published[@]}"})
    model_options=("${data_options[@]}" --llama_model_path "$model" --seed "$seed")
    adapted=("${model_options[@]}" --lora_ckpt "$out/task-base_LLM" --anchor_selection_dir "$out/anchor_selection")
    step history_anchor history_anchor.py "${data_options[@]}" --encoder "$encoder" \
        --candidate_path "$folder/user_anchor_candidate.json" --output_dir "$out/anchor_selection"
    step task_lora task_lora.py "${model_options[@]}" \
        --output_dir "$out/task-base_LLM"
    step train_anchor_peft train_anchor_peft.py "${adapted[@]}" \
        --holdout "$holdout" --output_dir "$out/Anchor_PEFT/LoRA"
    step lora_composition_evo lora_composition_evo.py "${adapted[@]}" \
        --anchor_dir "$out/Anchor_PEFT/LoRA" --n_sim 3 --opt_type cma --opt_budget 10 --sim_penalty 0.1 \
        "${fitness[@]}" --output_dir "$out/LoRA-Composition-evo"
    attack mia LoRA-Composition-evo
    if [ "$methods" = all ]; then
        baseline best_sharer Best-sharer
        baseline uniform Uniform
        per_pcs
        other_searches
        user_training
    fi
    step postprocess postprocess.py "${data_options[@]}" --output_dir "$out/LoRA-Composition-evo"
    [ "$fresh" = yes ] || [ ! -f "$out/summary.md" ] || sed '/^## /,$d' "$out/summary.md"
done
[ "$failure" = 0 ] || echo "failed: ${failures[*]}. The same command tries it again." >&2
exit "$failure"
