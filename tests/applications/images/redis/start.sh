#!/bin/sh
redis6-server --appendonly yes --dir /var/lib/redis* --daemonize yes
exec websockify 6380 127.0.0.1:6379
