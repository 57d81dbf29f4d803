# A private PostgreSQL of the user that runs this: prints its directory, and removes it when standard
# input ends. That happens at every end of the service, kill -9 included.
set -eu
unset PGDATA PGPORT PGHOST PGOPTIONS

# The newest is tried first, and versions before 14 never.
usable() {
  for bin; do
    if ! { [ -x "$bin/initdb" ] && [ -x "$bin/pg_ctl" ] && [ -x "$bin/postgres" ]; }; then continue; fi
    major=$("$bin/postgres" --version | sed 's/^[^0-9]*\([0-9]*\).*/\1/')
    [ "$major" -lt 14 ] || echo "$major $bin"
  done | sort -rn | sed -n '1s/^[0-9]* //p'
}

if [ -n "${PG_BIN:-}" ]; then
  bin=$(usable "$PG_BIN")
else
  bin=$(usable "$(pg_config --bindir 2>/dev/null || true)" "$(dirname "$(command -v pg_ctl || echo /)")" \
    /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin \
    /usr/local/opt/postgresql*/bin /home/linuxbrew/.linuxbrew/opt/postgresql*/bin)
fi
[ -n "$bin" ] || exit 3

umask 077
dir=$(mktemp -d "${TMPDIR:-/tmp}/payments.XXXXXX" 2>/dev/null || mktemp -d /tmp/payments.XXXXXX)
remove() {
  trap '' INT TERM HUP
  "$bin/pg_ctl" -D "$dir/data" -m immediate -w stop >/dev/null 2>&1 || true
  rm -rf "$dir"
}
trap remove EXIT
trap 'exit 1' INT TERM HUP

run() {
  "$@" >>"$dir/log" 2>&1 </dev/null || {
    cat "$dir/log" >&2
    exit 1
  }
}
run "$bin/initdb" -D "$dir/data" --username=payments --auth=trust --encoding=UTF8 --no-locale --no-sync
# Nobody else can enter the directory, so that its socket needs no password.
cat >>"$dir/data/postgresql.conf" <<CONF
listen_addresses = ''
port = 5432
unix_socket_directories = '$dir'
CONF
run "$bin/pg_ctl" -D "$dir/data" -l "$dir/server.log" -w start

echo "$dir"
cat >/dev/null
