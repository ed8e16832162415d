#!/bin/sh
# What the tests of the page (tests/page) need beside the set-up: a Chromium, Playwright that drives it, and axe-core.
#
#     sh scripts/browser.sh
#
# The Chromium is the machine's own; where there is none, root gets Debian's with apt, others Playwright's build. Without
# it these tests are skipped.
set -eu
cd -- "$(dirname -- "$0")/.."

sh scripts/setup.sh
mkdir -p .cache
.venv/bin/python -m pip --disable-pip-version-check --no-input install -q -e '.[browser]'

find_browser() {
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name"; then return 0; fi
    done
    return 1
}
if find_browser >/dev/null; then
    :
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "browser: installing chromium with apt" >&2
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    { apt-get install -y chromium || { apt-get update && apt-get install -y chromium; }; } >.cache/browser.log 2>&1 </dev/null ||
        { echo "error: chromium could not be installed, see .cache/browser.log" >&2 && exit 1; }
else
    .venv/bin/python -m playwright install chromium
fi
echo "browser: $(find_browser || echo "Playwright's own")"
