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

s3_keys() { # ACCESS SECRET: as boto3 and Ray read them
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$1" "$2"
}

for name in postgres_password postgres_mlflow_password postgres_prefect_password ray_auth_token s3_secret_key \
  mlflow_secret_key; do
  random 32 | keep "$name"
done
random 10 | keep s3_access_key
s3_keys "$(cat "$secrets/s3_access_key")" "$(cat "$secrets/s3_secret_key")" | keep s3_root_credentials
for name in mlflow nodes; do # users who reach one bucket each
  s3_keys "$(random 10)" "$(random 32)" | keep "s3_${name}_credentials"
done
printf 'dopsd:%s' "$(random 16)" | keep prefect_auth
random 16 | keep mlflow_password
keep mlflow_login <<EOF
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg2://mlflow@postgres:5432/mlflow
admin_username = dopsd
admin_password = $(cat "$secrets/mlflow_password")
authorization_function = infra.local.origin:authenticate
auth_cache_ttl_seconds = 60
EOF
openssl rand 32 | keep oauth2_cookie_secret # oauth2-proxy wants 32 raw bytes
printf '' | keep hf_token                   # yours, for gated models only (infra/README.md)
printf '' | keep oidc_client_secret         # yours, for the profile `tls` only; no newline at its end
