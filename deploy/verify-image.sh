#!/bin/sh
# Checks an image without a Docker daemon: runs its command as the image's user, with a read-only
# root and only the loopback network, and sends a request. Needs root, buildah, bwrap, nsenter, curl.
#
#   deploy/verify-image.sh chunkllama:cpu [options for buildah, e.g. --root DIR]
set -eu
image=$1
shift
work=$(mktemp -d)
container=$(buildah "$@" from --pull-never "$image")
server=
cleanup() {
    [ -z "$server" ] || kill "$server" 2> /dev/null || true
    buildah "$@" umount "$container" > /dev/null
    buildah "$@" rm "$container" > /dev/null
    rm -rf "$work"
}
trap 'cleanup "$@"' EXIT
rootfs=$(buildah "$@" mount "$container")
config() { buildah "$@" inspect --type image --format "$query" "$image"; }
query='{{.OCIv1.Config.User}}' && user=$(config "$@")
query='{{range .OCIv1.Config.Env}}{{println .}}{{end}}' && config "$@" > "$work/env"
query='{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}'
config "$@" > "$work/command"

# shellcheck disable=SC2046  # one word a line
bwrap --ro-bind "$rootfs" / --proc /proc --dev /dev --tmpfs /tmp --chmod 1777 /tmp \
    --tmpfs /cache --chmod 0777 /cache --chdir /cache \
    --unshare-net --unshare-pid --unshare-ipc --unshare-uts --info-fd 3 3> "$work/info" \
    --cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_SETPCAP \
    setpriv --reuid="${user%:*}" --regid="${user#*:}" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all \
    env -i $(cat "$work/env") $(cat "$work/command") > "$work/log" 2>&1 &
server=$!
for _ in $(seq 50); do
    sleep 0.1
    pid=$(sed -n 's/.*"child-pid": \([0-9]*\).*/\1/p' "$work/info")
    [ -z "$pid" ] || break
done
inside() { nsenter --target "$pid" --net "$@"; }
ask() { inside curl --silent --show-error --fail --max-time 60 "$@"; }
for _ in $(seq 120); do
    sleep 1
    ask http://127.0.0.1:8000/health > /dev/null 2>&1 && break
    kill -0 "$server" 2> /dev/null || { cat "$work/log" >&2; exit 1; }
done
cat "$work/log"
main=$(pgrep -P "$pid" | head -n 1)
echo "user of the server: $(stat -c %u:%g "/proc/${main:-$pid}")"
echo "root file system: $(nsenter --target "$pid" --mount touch /opt/chunkllama/x 2>&1 || true)"
echo "interfaces: $(inside cat /proc/net/dev | sed -n 's/^ *\([a-z0-9]*\):.*/\1/p' | tr '\n' ' ')"
ask http://127.0.0.1:8000/v1/chat/completions --json '{
    "model": "smollm2-135m-instruct", "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}]}' > "$work/answer"
cat "$work/answer" && echo
grep -q Paris "$work/answer"
kill -TERM "${main:-$pid}"
wait "$server" && echo "stopped with exit code 0"
server=
