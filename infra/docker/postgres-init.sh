#!/bin/sh
# Run by the postgres image once, on an empty volume: a role and a database for each of Prefect and MLflow.
set -eu
for name in mlflow prefect; do
  export PASSWORD_FILE="${SECRETS:-/run/secrets}/postgres_${name}_password"
  psql --no-psqlrc --set ON_ERROR_STOP=1 --set name="$name" --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\set password `cat "$PASSWORD_FILE"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
