//! Calls made once, and what became of each.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};

use crate::kind::Failure;
use crate::names;

/// Calls made at the same time.
const AT_ONCE: usize = 8;

/// One call to make.
#[derive(Clone, Debug, Deserialize)]
pub struct Call {
    /// `host:port`; for a name alone, the name.
    pub to: String,
    #[serde(flatten)]
    pub what: What,
    #[serde(default = "some_seconds")]
    pub timeout_ms: u64,
}

fn some_seconds() -> u64 {
    10_000
}

/// What to say once connected.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum What {
    /// An HTTP request with these headers, on a connection of its own or, for `times` more than
    /// one, all on one.
    Http {
        #[serde(default)]
        path: String,
        #[serde(default)]
        headers: BTreeMap<String, String>,
        #[serde(default = "once")]
        times: u32,
    },
    /// So many bytes, which must all come back.
    Echo { bytes: usize },
    /// Waits for the server to speak first, then one line there and back.
    Banner,
    /// So many bytes, then the end of this side; the answer must still come.
    Sum { bytes: usize },
    /// So many lines, each after a pause.
    Trickle { lines: u32, pause_ms: u64 },
    /// One datagram there and back.
    Udp,
    /// The system's resolver.
    Resolve,
    /// A DNS message.
    Dns {
        record: String,
        #[serde(default)]
        server: Option<IpAddr>,
        #[serde(default)]
        tcp: bool,
    },
}

fn once() -> u32 {
    1
}

/// What became of a call.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    ok: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    failure: Option<Failure>,
    /// Both ends of the connection, as the caller sees them.
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    /// What the server said.
    #[serde(skip_serializing_if = "Value::is_null")]
    answer: Value,
    took_ms: u64,
}

/// Makes all calls of a JSON list, a few at a time, and gives their outcomes in the same order.
pub async fn all(calls: &str) -> Result<String> {
    let calls: Vec<Call> = serde_json::from_str(calls).context("reading the calls")?;
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let tasks: Vec<_> = calls
        .into_iter()
        .map(|call| {
            let gate = std::sync::Arc::clone(&gate);
            tokio::spawn(async move {
                let _permit = gate.acquire_owned().await;
                one(&call).await
            })
        })
        .collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.context("a call ended early")?);
    }
    serde_json::to_string(&outcomes).context("writing the outcomes")
}

/// Makes one call.
pub async fn one(call: &Call) -> Outcome {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    let limit = Duration::from_millis(call.timeout_ms);
    let done = timeout(limit, speak(call, &mut outcome)).await;
    match done.unwrap_or_else(|_| Err(Failure::timeout())) {
        Ok(()) => outcome.ok = true,
        Err(failure) => outcome.failure = Some(failure),
    }
    outcome.took_ms = start.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    outcome
}

impl Outcome {
    /// The failure, if it failed.
    pub fn failure(self) -> Option<Failure> {
        self.failure
    }

    /// Which pod answered, if one told.
    pub fn server(&self) -> Option<&str> {
        self.answer.get("pod").and_then(Value::as_str)
    }
}

async fn speak(call: &Call, outcome: &mut Outcome) -> Result<(), Failure> {
    match &call.what {
        What::Resolve => {
            let found = names::resolve(&call.to).await?;
            let found: Vec<String> = found.iter().map(SocketAddr::to_string).collect();
            outcome.answer = json!(found);
            return Ok(());
        }
        What::Dns { record, server, tcp } => {
            outcome.answer = names::ask(&call.to, record, *server, *tcp).await?;
            return Ok(());
        }
        What::Udp => return datagram(call, outcome).await,
        _ => {}
    }
    let to = *names::resolve(&call.to).await?.first().ok_or_else(Failure::timeout)?;
    outcome.remote = Some(to.to_string());
    let stream = TcpStream::connect(to).await?;
    outcome.local = stream.local_addr().ok().map(|address| address.to_string());
    outcome.answer = match &call.what {
        What::Http { path, headers, times } => {
            http(stream, &call.to, path, headers, *times, outcome).await?
        }
        What::Echo { bytes } => echo(stream, *bytes).await?,
        What::Banner => banner(stream).await?,
        What::Sum { bytes } => sum(stream, *bytes).await?,
        What::Trickle { lines, pause_ms } => trickle(stream, *lines, *pause_ms).await?,
        What::Resolve | What::Dns { .. } | What::Udp => Value::Null,
    };
    Ok(())
}

async fn http(
    stream: TcpStream,
    host: &str,
    path: &str,
    headers: &BTreeMap<String, String>,
    times: u32,
    outcome: &mut Outcome,
) -> Result<Value, Failure> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Failure::http(&error))?;
    let connection = tokio::spawn(connection);
    let path = if path.is_empty() { "/" } else { path };
    let mut answer = Value::Null;
    for turn in 1..=times {
        let mut request = Request::get(path).header("host", host);
        if turn == times {
            request = request.header("connection", "close");
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::<Bytes>::default()).map_err(Failure::wrong)?;
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            // How the connection failed is told with the request that it met, or by itself.
            Err(error) if error.is_canceled() => {
                return Err(match Failure::of_connection(&error) {
                    Some(failure) => failure,
                    None => ended(connection).await,
                });
            }
            Err(error) => return Err(Failure::http(&error)),
        };
        let status = response.status();
        outcome.status = Some(status.as_u16());
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| Failure::http(&error))?.to_bytes();
        answer = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&body).into_owned()));
        if !status.is_success() {
            outcome.answer = answer;
            return Err(Failure::wrong(format!("status {status}")));
        }
    }
    // The tunnel below is recorded when the connection ends, and that is looked for next.
    drop(sender);
    let _ = connection.await;
    Ok(answer)
}

/// How a connection ended that was over before the request.
async fn ended(connection: tokio::task::JoinHandle<hyper::Result<()>>) -> Failure {
    match connection.await {
        Ok(Err(error)) => Failure::http(&error),
        _ => Failure::from(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index % 251) as u8).collect()
}

async fn echo(mut stream: TcpStream, bytes: usize) -> Result<Value, Failure> {
    let (sent, mut got) = (pattern(bytes), Vec::with_capacity(bytes));
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(&sent).await?;
        write.shutdown().await
    };
    let receive = read.read_to_end(&mut got);
    let (send, receive) = tokio::join!(send, receive);
    // What ended the reading tells more than what ended the writing.
    receive?;
    send?;
    if got.len() < sent.len() {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    if got != sent {
        return Err(Failure::wrong("other bytes came back than were sent"));
    }
    Ok(Value::Null)
}

async fn banner(stream: TcpStream) -> Result<Value, Failure> {
    let mut stream = BufReader::new(stream);
    let greeting = read_line(&mut stream).await?;
    stream.write_all(b"hello\n").await?;
    if read_line(&mut stream).await? != "hello" {
        return Err(Failure::wrong("another line came back than was sent"));
    }
    serde_json::from_str(&greeting).map_err(Failure::wrong)
}

async fn sum(mut stream: TcpStream, bytes: usize) -> Result<Value, Failure> {
    let sent = pattern(bytes);
    stream.write_all(&sent).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.is_empty() {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    let answer: Value = serde_json::from_str(&answer).map_err(Failure::wrong)?;
    let want =
        sent.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
    if answer.get("sum").and_then(Value::as_u64) != Some(want) {
        return Err(Failure::wrong(format!("the server got something else: {answer}")));
    }
    Ok(answer)
}

async fn trickle(stream: TcpStream, lines: u32, pause_ms: u64) -> Result<Value, Failure> {
    let mut stream = BufReader::new(stream);
    stream.write_all(format!("{lines} {pause_ms}\n").as_bytes()).await?;
    for number in 0..lines {
        let line = read_line(&mut stream).await?;
        if line != number.to_string() {
            return Err(Failure::wrong(format!("line {line:?} came in place of {number}")));
        }
    }
    Ok(Value::Null)
}

async fn datagram(call: &Call, outcome: &mut Outcome) -> Result<(), Failure> {
    let to = *names::resolve(&call.to).await?.first().ok_or_else(Failure::timeout)?;
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).await?;
    socket.connect(to).await?;
    outcome.local = socket.local_addr().ok().map(|address| address.to_string());
    outcome.remote = Some(to.to_string());
    socket.send(b"hello").await?;
    let mut buffer = [0; 2048];
    let count = socket.recv(&mut buffer).await?;
    let answer = serde_json::from_slice(buffer.get(..count).unwrap_or_default());
    outcome.answer = answer.map_err(Failure::wrong)?;
    Ok(())
}

/// One line without its end; a connection that ends before is a failure.
pub async fn read_line(stream: &mut BufReader<TcpStream>) -> Result<String, Failure> {
    let mut line = String::new();
    stream.take(64 << 10).read_line(&mut line).await?;
    match line.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
    }
}
