//! The server of istio-cni's socket, from single packets up to one that keeps pods.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use culvert_proto::istio::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_request, workload_response,
};
use prost::Message;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_seqpacket::ancillary::AncillaryMessageWriter;
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::accepted;

/// How long istio-cni waits for an answer.
const ANSWER: Duration = Duration::from_secs(20);

/// A pod as istio-cni hands it over.
#[derive(Clone, Debug)]
pub struct Add {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// `None`: it is known, but its namespace is not.
    pub netns: Option<Arc<File>>,
}

impl Add {
    /// Whether it is the same pod under the same names.
    pub fn is_same(&self, other: &Add) -> bool {
        let names =
            |add: &Add| (add.uid.clone(), add.namespace.clone(), add.service_account.clone());
        names(self) == names(other)
    }

    fn request(&self) -> WorkloadRequest {
        request(match self.netns {
            Some(_) => workload_request::Payload::Add(AddWorkload {
                uid: self.uid.clone(),
                workload_info: Some(WorkloadInfo {
                    name: self.name.clone(),
                    namespace: self.namespace.clone(),
                    service_account: self.service_account.clone(),
                }),
            }),
            None => workload_request::Payload::Keep(KeepWorkload { uid: self.uid.clone() }),
        })
    }
}

fn request(payload: workload_request::Payload) -> WorkloadRequest {
    WorkloadRequest { payload: Some(payload) }
}

/// A socket that waits for agents, for tests that speak for themselves.
pub struct Listening {
    runtime: Arc<Runtime>,
    listener: UnixSeqpacketListener,
}

impl Listening {
    /// Listens at a path, in place of what listened there.
    pub fn bind(path: &Path) -> Result<Self> {
        let runtime = Arc::new(runtime()?);
        let listener = bind(&runtime, path)?;
        Ok(Self { runtime, listener })
    }

    /// The next connection, within `limit`.
    pub fn accept(&mut self, limit: Duration) -> Result<Line> {
        let accepting = tokio_timeout(limit, self.listener.accept());
        let socket = self.runtime.block_on(accepting).context("no connection")??;
        Ok(Line { runtime: self.runtime.clone(), socket })
    }
}

/// One connection, spoken packet by packet.
pub struct Line {
    runtime: Arc<Runtime>,
    socket: UnixSeqpacket,
}

impl Line {
    /// The agent's first packet.
    pub fn hello(&self) -> Result<Vec<u8>> {
        self.runtime.block_on(receive(&self.socket))
    }

    /// Sends a packet, and gives the error of the answer: empty when all is well.
    pub fn ask(&self, bytes: &[u8], descriptors: &[Arc<File>]) -> Result<String> {
        self.runtime.block_on(ask(&self.socket, bytes, descriptors))
    }

    /// Hands a pod over, or tells to keep it.
    pub fn add(&self, add: &Add) -> Result<String> {
        self.ask(&add.request().encode_to_vec(), add.netns.as_slice())
    }

    /// Takes a pod out of the mesh.
    pub fn del(&self, uid: &str) -> Result<String> {
        self.ask(&del(uid).encode_to_vec(), &[])
    }

    /// Ends the snapshot.
    pub fn snapshot_sent(&self) -> Result<String> {
        self.ask(&snapshot_sent().encode_to_vec(), &[])
    }

    /// Waits until the agent has closed the connection.
    pub fn ended(&self) -> Result<()> {
        match self.hello() {
            Ok(bytes) if bytes.is_empty() => Ok(()),
            Ok(bytes) => bail!("a packet: {bytes:?}"),
            Err(error) => Err(error),
        }
    }
}

/// istio-cni as agents expect it: it keeps pods, tells them to each agent that connects, and later
/// ones to the newest.
pub struct Cni {
    runtime: Option<Runtime>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    pods: Mutex<BTreeMap<String, Add>>,
    /// Of the connections whose snapshot is complete, the newest last.
    lines: Mutex<Vec<mpsc::Sender<Asked>>>,
}

struct Asked {
    request: WorkloadRequest,
    netns: Option<Arc<File>>,
    answer: oneshot::Sender<Result<String>>,
}

impl Cni {
    /// Listens at a path, in place of what listened there.
    pub fn start(path: &Path) -> Result<Self> {
        let runtime = runtime()?;
        let mut listener = bind(&runtime, path)?;
        let shared = Arc::new(Shared::default());
        let serving = shared.clone();
        runtime.spawn(async move {
            while let Ok(socket) = listener.accept().await {
                let shared = serving.clone();
                tokio::spawn(async move {
                    // A connection that breaks is the agent's to make anew.
                    let _ = shared.serve(&socket).await;
                });
            }
        });
        Ok(Self { runtime: Some(runtime), shared })
    }

    /// Adds a pod to what the next snapshot tells.
    pub fn remember(&self, add: Add) {
        self.shared.pods().insert(add.uid.clone(), add);
    }

    /// Hands a pod over to the newest agent, which must take it, and otherwise to the first that comes.
    pub fn add(&self, add: Add) -> Result<()> {
        self.remember(add.clone());
        let line = self.shared.lines().last().filter(|line| !line.is_closed()).cloned();
        match line {
            Some(line) => accepted(&self.tell(&line, add.request(), add.netns.clone())?),
            None => Ok(()),
        }
    }

    /// Takes a pod away from all agents.
    pub fn del(&self, uid: &str) -> Result<()> {
        self.shared.pods().remove(uid);
        for line in self.shared.lines().clone() {
            accepted(&self.tell(&line, del(uid), None)?)?;
        }
        Ok(())
    }

    /// How many agents have their snapshot.
    pub fn agents(&self) -> usize {
        self.shared.lines().iter().filter(|line| !line.is_closed()).count()
    }

    /// Ends, closing all connections, and gives the pods that it kept.
    pub fn stop(mut self) -> BTreeMap<String, Add> {
        let pods = self.shared.pods().clone();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(ANSWER);
        }
        pods
    }

    fn tell(
        &self,
        line: &mpsc::Sender<Asked>,
        request: WorkloadRequest,
        netns: Option<Arc<File>>,
    ) -> Result<String> {
        let (answer, answered) = oneshot::channel();
        // A line that has ended answers nothing and needs nothing.
        if line.blocking_send(Asked { request, netns, answer }).is_err() {
            return Ok(String::new());
        }
        answered.blocking_recv().unwrap_or(Ok(String::new()))
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        // Also where a test may not block.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    async fn serve(&self, socket: &UnixSeqpacket) -> Result<()> {
        let hello = ZdsHello::decode(receive(socket).await?.as_slice())?;
        if hello.version != i32::from(Version::V1) {
            bail!("another version: {hello:?}");
        }
        let pods: Vec<Add> = self.pods().values().cloned().collect();
        for add in pods {
            // What cannot be served is told again by another snapshot.
            ask(socket, &add.request().encode_to_vec(), add.netns.as_slice()).await?;
        }
        accepted(&ask(socket, &snapshot_sent().encode_to_vec(), &[]).await?)?;
        let (line, mut asked) = mpsc::channel(8);
        {
            let mut lines = self.lines();
            lines.retain(|line| !line.is_closed());
            lines.push(line);
        }
        let mut unasked = [0; 1];
        loop {
            tokio::select! {
                next = asked.recv() => {
                    let Some(Asked { request, netns, answer }) = next else { return Ok(()) };
                    let told = ask(socket, &request.encode_to_vec(), netns.as_slice()).await;
                    let broken = told.is_err();
                    let _ = answer.send(told);
                    if broken {
                        return Ok(());
                    }
                }
                // An agent never speaks unasked: this is its end.
                _ = socket.recv(&mut unasked) => return Ok(()),
            }
        }
    }

    fn pods(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Add>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<mpsc::Sender<Asked>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn del(uid: &str) -> WorkloadRequest {
    request(workload_request::Payload::Del(DelWorkload { uid: uid.to_owned() }))
}

fn snapshot_sent() -> WorkloadRequest {
    request(workload_request::Payload::SnapshotSent(SnapshotSent {}))
}

fn runtime() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().context("starting a runtime")
}

fn bind(runtime: &Runtime, path: &Path) -> Result<UnixSeqpacketListener> {
    let _ = std::fs::remove_file(path);
    let _inside = runtime.enter();
    UnixSeqpacketListener::bind(path).with_context(|| format!("listening at {}", path.display()))
}

async fn tokio_timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output> {
    tokio::time::timeout(limit, future).await.with_context(|| format!("waited for {limit:?}"))
}

/// Empty at the connection's end.
async fn receive(socket: &UnixSeqpacket) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 1024];
    let message = tokio_timeout(ANSWER, socket.recv(&mut bytes)).await??;
    bytes.truncate(message.bytes_read());
    Ok(bytes)
}

async fn ask(socket: &UnixSeqpacket, bytes: &[u8], descriptors: &[Arc<File>]) -> Result<String> {
    let mut control = Control([0; 256]);
    let mut ancillary = AncillaryMessageWriter::new(&mut control.0);
    if !descriptors.is_empty() {
        ancillary
            .add_fds(descriptors.iter().map(|file| file.as_fd()))
            .map_err(|_| anyhow::anyhow!("too many descriptors"))?;
    }
    let parts = [std::io::IoSlice::new(bytes)];
    let sending = socket.send_vectored_with_ancillary(&parts, &mut ancillary);
    tokio_timeout(ANSWER, sending).await??;
    let answer = WorkloadResponse::decode(receive(socket).await?.as_slice())?;
    match answer.payload {
        Some(workload_response::Payload::Ack(ack)) => Ok(ack.error),
        None => bail!("an answer without content"),
    }
}

#[repr(align(8))]
struct Control([u8; 256]);
