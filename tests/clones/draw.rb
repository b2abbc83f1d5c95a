require "json"
require "openssl"
require "securerandom"
require_relative "renew"

$stdout.sync = true
while (line = $stdin.gets)
  made = line == "draw\n" ? {
    "rand" => rand, "shuffle" => (1..1000).to_a.shuffle, "SecureRandom.uuid" => SecureRandom.uuid, "SecureRandom.hex" => SecureRandom.hex,
    "OpenSSL::Random" => OpenSSL::Random.random_bytes(16).unpack1("H*"),
  } : renew
  puts JSON.generate(made)
end
