#!/bin/sh
PATH=$PATH:$(ls -d /usr/lib/postgresql/*/bin)
pg_ctl -w -D $(ls -d /var/lib/pgsql/data /var/lib/postgresql/data 2>/dev/null) start
exec websockify 5433 127.0.0.1:5432
