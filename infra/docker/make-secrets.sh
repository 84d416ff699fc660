#!/usr/bin/env bash
# Makes the secrets of compose.yaml in secrets/ beside this file. What is there is kept, so it may be run again.
# The folder is the owner's alone. The files in it are world-readable: compose mounts them as they are, and the
# services run as users of their own.
set -euo pipefail
umask 022
secrets="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/secrets"
mkdir -p "$secrets"
chmod 700 "$secrets"

keep() { # NAME: standard input becomes that secret, unless there is one
  local file="$secrets/$1"
  if [[ -e "$file" ]]; then
    cat >/dev/null
  else
    cat >"$file.partial"
    mv "$file.partial" "$file"
    echo "made $1"
  fi
}
random() { # BYTES: that many random bytes in hexadecimal, without a newline: some readers would keep it
  openssl rand -hex "$1" | tr -d '\n'
}

for name in postgres_password postgres_mlflow_password postgres_prefect_password ray_auth_token s3_secret_key; do
  random 32 | keep "$name"
done
random 10 | keep s3_access_key
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
  "$(cat "$secrets/s3_access_key")" "$(cat "$secrets/s3_secret_key")" | keep s3_credentials
printf 'dopsd:%s' "$(random 16)" | keep prefect_auth
openssl rand 32 | keep oauth2_cookie_secret # oauth2-proxy wants 32 raw bytes
printf '' | keep hf_token                   # yours, for gated models only (infra/README.md)
printf '' | keep oidc_client_secret         # yours, for the profile `tls` only; no newline at its end
