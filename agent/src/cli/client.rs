//! Asks a running agent over its admin address, in HTTP/1.1.

use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::{ConfigError, DEFAULT_ADMIN, Named};

/// A dump of a hundred thousand workloads has some 100 MiB.
const MAX_ANSWER: usize = 1 << 30;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Why there is no answer. `Unreachable` is mostly the user's side, the others the agent's.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no agent answers at {address} ({source}); start one with `culvert run`, or say where it \
         listens with --admin or ADMIN_ADDR"
    )]
    Unreachable { address: String, source: io::Error },
    #[error("the agent at {address} broke off its answer to {path}: {source}")]
    Broken { address: String, path: String, source: Box<dyn Error + Send + Sync> },
    #[error("the agent at {address} did not answer {path} within {} s", ANSWER_WITHIN.as_secs())]
    Slow { address: String, path: String },
    #[error("the agent at {address} answered {path} with {status}{}", colon(.why))]
    Refused { address: String, path: String, status: StatusCode, why: String },
}

fn colon(why: &str) -> String {
    if why.is_empty() { String::new() } else { format!(": {why}") }
}

/// An agent's admin address, `host:port`.
pub(super) struct Server {
    address: String,
}

impl Server {
    pub(super) fn new(
        flag: Option<String>,
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let stated = variable("ADMIN_ADDR").filter(|value| !value.is_empty());
        let (name, address) = match (flag, stated) {
            (Some(flag), _) => ("--admin", flag),
            (None, Some(stated)) => ("ADMIN_ADDR", stated.to_string_lossy().into_owned()),
            (None, None) => ("ADMIN_ADDR", DEFAULT_ADMIN.to_string()),
        };
        match address.parse::<culvert_core::addr::Authority>() {
            Ok(_) => Ok(Server { address }),
            Err(_) => Err(ConfigError::Invalid {
                setting: Named(name.to_owned()),
                value: address,
                why: "is not host:port, as 127.0.0.1:15000".to_owned(),
            }),
        }
    }

    pub(super) async fn get_json(&self, path: &str) -> Result<Value, ClientError> {
        let body = self.ask(Method::GET, path).await?;
        serde_json::from_slice(&body).map_err(|error| self.broken(path, error))
    }

    pub(super) async fn post(&self, path: &str, query: &str) -> Result<String, ClientError> {
        let target = match query {
            "" => path.to_owned(),
            query => format!("{path}?{query}"),
        };
        let body = self.ask(Method::POST, &target).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn ask(&self, method: Method, path: &str) -> Result<Bytes, ClientError> {
        let unreachable =
            |source| ClientError::Unreachable { address: self.address.clone(), source };
        let stream = match timeout(CONNECT_WITHIN, TcpStream::connect(&self.address)).await {
            Ok(connected) => connected.map_err(unreachable)?,
            Err(_) => return Err(unreachable(io::ErrorKind::TimedOut.into())),
        };
        match timeout(ANSWER_WITHIN, self.exchange(stream, method, path)).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(ClientError::Slow { address: self.address.clone(), path: path.to_owned() })
            }
        }
    }

    async fn exchange(
        &self,
        stream: TcpStream,
        method: Method,
        path: &str,
    ) -> Result<Bytes, ClientError> {
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.broken(path, error))?;
        // It ends with the sender, at the end of this exchange.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, &self.address)
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.broken(path, error))?;
        let response = sender.send_request(request);
        let response = response.await.map_err(|error| self.broken(path, error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| self.broken(path, error))?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let why: String = String::from_utf8_lossy(&body).trim().chars().take(2000).collect();
        let (address, path) = (self.address.clone(), path.to_owned());
        Err(ClientError::Refused { address, path, status, why })
    }

    fn broken(&self, path: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> ClientError {
        ClientError::Broken {
            address: self.address.clone(),
            path: path.to_owned(),
            source: source.into(),
        }
    }
}
