#!/bin/sh
# with-secrets COMMAND...: run COMMAND with NAME set to the content of the file in NAME__FILE, for each such variable.
# Compose hands secrets as files; libpq, asyncpg and Prefect read theirs from the environment alone.
set -eu
for name in $(env | sed -n 's/^\([A-Za-z0-9_]*\)__FILE=.*/\1/p'); do
  path="$(printenv "${name}__FILE")"
  if [ ! -r "$path" ]; then
    echo "with-secrets: $path, wanted for $name, cannot be read; run infra/docker/make-secrets.sh" >&2
    exit 1
  fi
  export "$name=$(cat "$path")"
done
exec "$@"
