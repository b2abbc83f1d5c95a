#!/bin/sh
pg_ctl -w -D /var/lib/pgsql/data start
exec websockify 5433 127.0.0.1:5432
