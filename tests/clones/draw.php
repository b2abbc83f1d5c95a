<?php
require "renew.php";

while (($line = fgets(STDIN)) !== false) {
    $made = $line === "draw\n" ? [
        "mt_rand" => mt_rand(), "rand" => rand(), "lcg_value" => lcg_value(), "random_bytes" => bin2hex(random_bytes(16)),
        "random_int" => random_int(0, PHP_INT_MAX), "openssl_random_pseudo_bytes" => bin2hex(openssl_random_pseudo_bytes(16)),
        "uniqid" => uniqid(), "uniqid, more entropy" => uniqid("", true),
    ] : renew();
    echo json_encode($made), "\n";
    flush();
}
