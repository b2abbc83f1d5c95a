// A counter behind HTTP/1.1 of its own, a thread for each connection.
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

fn main() {
    for stream in TcpListener::bind("0.0.0.0:8080").unwrap().incoming().flatten() {
        std::thread::spawn(move || {
            let mut writer = stream.try_clone().unwrap();
            let mut lines = BufReader::new(stream).lines();
            while let Some(Ok(line)) = lines.next() {
                if line.is_empty() {
                    let body = format!("{}\n", COUNT.fetch_add(1, Ordering::SeqCst) + 1);
                    let _ = write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", body.len(), body);
                }
            }
        });
    }
}
