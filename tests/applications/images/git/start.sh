#!/bin/sh
(umask 0; exec setpriv --reuid www-data --regid www-data --clear-groups fcgiwrap -s unix:/tmp/fcgiwrap.sock) &
exec nginx -g 'daemon off;'
