# Sets `python`, the project's Python: that of .venv, else python3. Sourced by the launchers, which set `root`.
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
if ! problem=$(cd / && "$python" -c "import engine" 2>&1); then
    echo "error: ${problem##*$'\n'}; 'pip install -r requirements.txt' in $root makes the project's packages known" >&2
    exit 2
fi
