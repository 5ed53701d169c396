//! The ports that speak plain TCP.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::{Shared, line};

/// Sends back what it reads, until the end.
pub async fn echo(mut stream: TcpStream, _remote: SocketAddr, _shared: Arc<Shared>) {
    // A caller that has gone away needs no answer; the same below.
    let _ = give_back(&mut stream).await;
}

/// Says who it is before it was asked, and then sends back what it reads.
pub async fn banner(mut stream: TcpStream, remote: SocketAddr, shared: Arc<Shared>) {
    let greeting = shared.greeting(&stream, remote);
    if line(&mut stream, &greeting).await.is_ok() {
        let _ = give_back(&mut stream).await;
    }
}

async fn give_back(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(buffer.get(..count).unwrap_or_default()).await?;
    }
}

/// Reads a count and a pause in milliseconds, and sends that many numbered lines.
pub async fn trickle(stream: TcpStream, _remote: SocketAddr, _shared: Arc<Shared>) {
    let work = async {
        let (read, mut write) = stream.into_split();
        let mut asked = String::new();
        BufReader::new(read).take(64).read_line(&mut asked).await?;
        let mut words = asked.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        let (count, pause) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
        for number in 0..count {
            write.write_all(format!("{number}\n").as_bytes()).await?;
            sleep(Duration::from_millis(pause)).await;
        }
        write.shutdown().await
    };
    let _: io::Result<()> = work.await;
}

/// Reads until the caller has ended its side, and only then answers with what it got.
pub async fn sum(mut stream: TcpStream, remote: SocketAddr, shared: Arc<Shared>) {
    let greeting = shared.greeting(&stream, remote);
    let work = async {
        let (mut bytes, mut sum, mut buffer) = (0, 0u64, vec![0; 64 << 10]);
        loop {
            let count = stream.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            bytes += count;
            let read = buffer.get(..count).unwrap_or_default();
            sum = read
                .iter()
                .fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
        }
        let answer = json!({ "pod": greeting.place.pod, "bytes": bytes, "sum": sum });
        line(&mut stream, &answer).await?;
        stream.shutdown().await
    };
    let _: io::Result<()> = work.await;
}
