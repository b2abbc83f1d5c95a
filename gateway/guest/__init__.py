"""What a microVM may ask of its host: credentials, and names. Answered by control, on sockets in the microVM's own network."""
