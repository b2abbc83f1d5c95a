#!/bin/sh
mkdir -p /run/php
sed -i 's|^listen = .*|listen = /run/php/fpm.sock|; s|^;*listen.mode = .*|listen.mode = 0666|; s|^pm = .*|pm = static|; s|^pm.max_children = .*|pm.max_children = 1|' $(find /etc/php* -name www.conf)
$(ls /usr/sbin/php-fpm* | head -1) --nodaemonize &
exec nginx -g 'daemon off;'
