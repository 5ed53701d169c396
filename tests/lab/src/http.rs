//! A small HTTP/1.1 client: one request, one connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// The body as text.
    pub body: String,
}

impl Response {
    /// The value of the first header called `name` (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Asks `at` for `path`. Connecting and every read may take up to `limit`.
pub fn get(at: SocketAddr, path: &str, limit: Duration) -> Result<Response> {
    let host = format!("host: {at}\r\n");
    request(at, "GET", path, &host, limit)
}

/// Like [`get`], with another method and no body.
pub fn send(at: SocketAddr, method: &str, path: &str, limit: Duration) -> Result<Response> {
    let headers = format!("host: {at}\r\ncontent-length: 0\r\n");
    request(at, method, path, &headers, limit)
}

fn request(
    at: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    limit: Duration,
) -> Result<Response> {
    let what = || format!("{method} http://{at}{path}");
    let mut stream = TcpStream::connect_timeout(&at, limit).with_context(what)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let text = format!("{method} {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).with_context(what)?;
    read(BufReader::new(stream)).with_context(what)
}

fn read(mut stream: impl BufRead) -> Result<Response> {
    let first = line(&mut stream)?;
    let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("not an HTTP answer: {first:?}"))?;
    let mut headers = Vec::new();
    loop {
        let header = line(&mut stream)?;
        let Some((name, value)) = header.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: String::new() };
    let chunked = response.header("transfer-encoding").is_some_and(|how| how.contains("chunked"));
    let length = response.header("content-length").and_then(|length| length.parse::<u64>().ok());
    let mut body = Vec::new();
    match length {
        _ if chunked => read_chunks(&mut stream, &mut body)?,
        Some(length) => {
            let got = stream.take(length).read_to_end(&mut body).context("reading the body")?;
            if got as u64 != length {
                bail!("the body was cut off after {got} of {length} bytes");
            }
        }
        None => drop(stream.read_to_end(&mut body).context("reading the body")?),
    }
    response.body = String::from_utf8_lossy(&body).into_owned();
    Ok(response)
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let size = line(stream)?;
        let size = size.split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(size, 16).with_context(|| format!("chunk size {size:?}"))?;
        let got = stream.take(size).read_to_end(body).context("reading a chunk")?;
        if got as u64 != size {
            bail!("a chunk was cut off");
        }
        line(stream)?;
        if size == 0 {
            return Ok(());
        }
    }
}

fn line(stream: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line).context("reading the answer")? == 0 {
        bail!("closed before the answer was whole");
    }
    Ok(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests;
