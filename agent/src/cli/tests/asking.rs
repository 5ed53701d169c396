//! Commands against an agent that answers, refuses, breaks off or is not there.

use std::io::{self, Write};
use std::sync::Arc;

use clap::Parser;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::cli::arguments::Arguments;
use crate::cli::client::Server;
use crate::cli::output::Output;
use crate::cli::{CliError, look};

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs one command; what it printed, or its error.
async fn culvert(line: &str, address: &str) -> Result<String, CliError> {
    let words = std::iter::once("culvert").chain(line.split(' '));
    let command = Arguments::try_parse_from(words).unwrap().command;
    let server = Server::new(Some(address.to_owned()), &|_| None)?;
    let screen = Screen::default();
    look(command, &server, &mut Output::to(screen.clone())).await?;
    let text = screen.0.lock().clone();
    Ok(String::from_utf8(text).unwrap())
}

/// Answers the next connection with these bytes; yields the request line.
async fn agent(answer: String) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned()
    });
    (address, served)
}

fn http(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn lists_come_as_table_or_json() {
    let dump = include_str!("config_dump.json");
    let (address, served) = agent(http("200 OK", dump)).await;
    let text = culvert("services", &address).await.unwrap();
    assert!(text.starts_with("NAMESPACE ") && text.ends_with("0/0\n"), "{text}");
    assert_eq!(served.await.unwrap(), "GET /config_dump HTTP/1.1");

    let (address, _served) = agent(http("200 OK", dump)).await;
    let text = culvert("workloads -o json --namespace shop", &address).await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json[0]["uid"], "c1//Pod/shop/api-5c6b");
    assert_eq!(json[0]["capacity"], 1, "keys that no table shows stay");
}

#[tokio::test]
async fn logging_posts_and_shows_the_answer() {
    let (address, served) = agent(http("200 OK", "current log level is debug\n")).await;
    let text = culvert("logging debug", &address).await.unwrap();
    assert_eq!(text, "current log level is debug\n");
    assert_eq!(served.await.unwrap(), "POST /logging?level=debug HTTP/1.1");
}

#[tokio::test]
async fn refusal_shows_the_agents_reason() {
    let (address, _served) = agent(http("404 Not Found", "no workload web/absent\n")).await;
    let error = culvert("explain web/absent 10.0.0.1:80", &address).await.unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "the agent at {address} answered \
             /culvert/explain?src=web%2Fabsent&dst=10.0.0.1%3A80 with 404 Not Found: \
             no workload web/absent"
        )
    );
}

#[tokio::test]
async fn absent_agent_is_told_with_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = culvert("status", &address).await.unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("no agent answers at {address} (Connection refused")),
        "{error}"
    );
    assert!(error.contains("culvert run") && error.contains("--admin"), "{error}");
}

#[tokio::test]
async fn answer_that_breaks_off_is_an_error() {
    for answer in [
        "",
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{",
        "SSH-2.0-x\r\n",
        &http("200 OK", "<html>"),
    ] {
        let (address, _served) = agent(answer.to_owned()).await;
        let error = culvert("pods", &address).await.unwrap_err().to_string();
        assert!(error.contains("broke off its answer to /culvert/pods"), "{error}");
    }
}

#[tokio::test]
async fn answer_of_another_shape_is_an_error() {
    let (address, _served) = agent(http("200 OK", "{\"pods\": 1}")).await;
    let error = culvert("pods", &address).await.unwrap_err().to_string();
    assert!(error.starts_with("the answer to /culvert/pods is not what"), "{error}");
}
