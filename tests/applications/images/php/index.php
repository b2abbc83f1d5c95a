<?php
session_start();
$_SESSION['visits'] = ($_SESSION['visits'] ?? 0) + 1;
echo json_encode(['visits' => $_SESSION['visits'], 'pid' => getmypid()]);
