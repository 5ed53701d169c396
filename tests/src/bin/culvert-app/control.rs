//! How a program started beside the server reaches it: a socket that is no file and no address, so
//! that neither a read-only root nor a mesh stands in between.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;

use crate::load::{Load, Plan};

/// Abstract, and so bound to the pod's network namespace.
const SOCKET: &str = "\0culvert-app";

#[derive(Debug, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Order {
    Start { id: String, plan: Plan },
    Report { id: String },
    Stop { id: String },
}

/// Every order may come twice, and is obeyed once.
enum Entry {
    Running(Load),
    /// With its last report.
    Ended(Value),
}

type Loads = Arc<Mutex<HashMap<String, Entry>>>;

/// Takes orders for loads until the process ends.
pub fn serve() -> Result<()> {
    let listener = match UnixListener::bind(SOCKET) {
        Ok(listener) => listener,
        Err(error) => {
            // Two servers in one network namespace: the first one takes the orders.
            eprintln!("no loads from here: {error}");
            return Ok(());
        }
    };
    let loads = Loads::default();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let loads = Arc::clone(&loads);
            tokio::spawn(async move {
                if let Err(error) = serve_one(stream, &loads).await {
                    eprintln!("an order failed: {error:#}");
                }
            });
        }
    });
    Ok(())
}

async fn serve_one(mut stream: UnixStream, loads: &Loads) -> Result<()> {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.context("reading an order")?;
    let answer = match serde_json::from_str(&text).context("reading an order") {
        Ok(order) => obey(order, loads).await,
        Err(error) => Err(error),
    };
    let answer = answer.unwrap_or_else(|error| json!({ "failed": format!("{error:#}") }));
    stream.write_all(answer.to_string().as_bytes()).await.context("answering")
}

async fn obey(order: Order, loads: &Loads) -> Result<Value> {
    let mut loads = loads.lock().await;
    match order {
        Order::Start { id, .. } | Order::Report { id } if loads.contains_key(&id) => {
            Ok(match loads.get(&id) {
                Some(Entry::Running(load)) => load.report(),
                Some(Entry::Ended(report)) => report.clone(),
                None => Value::Null,
            })
        }
        Order::Start { id, plan } => {
            let load = Load::start(plan).await?;
            let report = load.report();
            loads.insert(id, Entry::Running(load));
            Ok(report)
        }
        Order::Report { id } => bail!("no load is called {id}"),
        Order::Stop { id } => {
            let report =
                match loads.remove(&id).with_context(|| format!("no load is called {id}"))? {
                    Entry::Running(load) => load.stop().await,
                    Entry::Ended(report) => report,
                };
            loads.insert(id, Entry::Ended(report.clone()));
            Ok(report)
        }
    }
}

/// Gives an order to the server of this pod.
pub async fn order(order: &str) -> Result<String> {
    let mut stream = UnixStream::connect(SOCKET).await.context("reaching this pod's server")?;
    stream.write_all(order.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let value: Value = serde_json::from_str(&answer).context("reading the answer")?;
    if let Some(why) = value.get("failed") {
        bail!("{why}");
    }
    Ok(answer)
}
