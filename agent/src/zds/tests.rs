#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsFd;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_seqpacket::UnixSeqpacketListener;
use tokio_seqpacket::ancillary::AncillaryMessageWriter;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);
const SNAPSHOT_SENT: [u8; 2] = [0x1a, 0x00];
const SUCCESS: [u8; 2] = [0x0a, 0x00];

/// A client beside a server that a test plays.
struct Stage {
    listener: UnixSeqpacketListener,
    requests: mpsc::Receiver<Request>,
    sync: watch::Sender<bool>,
    client: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Stage {
    fn new(synced: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cni.sock");
        let listener = UnixSeqpacketListener::bind(&path).unwrap();
        let (orders, requests) = mpsc::channel(1);
        let (sync, mut is_synced) = watch::channel(synced);
        let client = tokio::spawn(async move {
            let synced = async move {
                let _ = is_synced.wait_for(|synced| *synced).await;
            };
            run(&path, synced, orders).await;
        });
        Self { listener, requests, sync, client, _folder: folder }
    }

    async fn line(&mut self) -> UnixSeqpacket {
        let socket = within(self.listener.accept()).await.unwrap();
        assert_eq!(receive(&socket).await, [0x08, 0x01]);
        socket
    }

    /// The next order, answered.
    async fn order(&mut self, answer: Result<(), &str>) -> Order {
        let request = within(self.requests.recv()).await.unwrap();
        request.answer.send(answer.map_err(str::to_owned)).unwrap();
        request.order
    }
}

#[repr(align(8))]
struct Control([u8; 128]);

async fn within<F: Future>(future: F) -> F::Output {
    timeout(LIMIT, future).await.unwrap()
}

async fn receive(socket: &UnixSeqpacket) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let message = within(socket.recv(&mut bytes)).await.unwrap();
    bytes.truncate(message.bytes_read());
    bytes
}

async fn send_with(socket: &UnixSeqpacket, bytes: &[u8], files: &[File]) {
    let mut control = Control([0; 128]);
    let mut ancillary = AncillaryMessageWriter::new(&mut control.0);
    ancillary.add_fds(files.iter().map(|file| file.as_fd())).unwrap();
    let parts = [IoSlice::new(bytes)];
    within(socket.send_vectored_with_ancillary(&parts, &mut ancillary)).await.unwrap();
}

/// Row Z15.
#[tokio::test]
async fn istio_cni_is_not_contacted_before_the_mesh_is_known() {
    let mut stage = Stage::new(false);
    let early = timeout(Duration::from_millis(300), stage.listener.accept()).await;
    assert!(early.is_err());
    stage.sync.send(true).unwrap();
    stage.line().await;
}

#[tokio::test]
async fn orders_are_carried_out_before_they_are_acknowledged() {
    let mut stage = Stage::new(true);
    let socket = stage.line().await;
    socket.send(&SNAPSHOT_SENT).await.unwrap();
    assert!(matches!(stage.order(Ok(())).await, Order::Snapshot { uids } if uids.is_empty()));
    assert_eq!(receive(&socket).await, SUCCESS);
    let add = [0x0a, 0x07, 0x0a, 1, b'u', 0x12, 2, 0x0a, 0];
    send_with(&socket, &add, &[File::open("/dev/null").unwrap()]).await;
    let order = stage.order(Err("no room")).await;
    assert!(matches!(order, Order::Add { uid, .. } if &*uid == "u"));
    let answer = receive(&socket).await;
    assert_eq!(&answer[4..], b"failure to start proxy : no room");
    // That was no fault of istio-cni's.
    socket.send(&[0x12, 0x03, 0x12, 0x01, b'u']).await.unwrap();
    assert!(matches!(stage.order(Ok(())).await, Order::Del { uid } if &*uid == "u"));
    assert_eq!(receive(&socket).await, SUCCESS);
}

#[tokio::test]
async fn lost_connection_is_told_and_made_anew() {
    let mut stage = Stage::new(true);
    for _ in 0..3 {
        let socket = stage.line().await;
        socket.send(&SNAPSHOT_SENT).await.unwrap();
        stage.order(Ok(())).await;
        assert_eq!(receive(&socket).await, SUCCESS);
        drop(socket);
        assert!(matches!(stage.order(Ok(())).await, Order::Lost(Loss::Closed)));
    }
}

#[tokio::test]
async fn fault_is_answered_and_ends_the_connection_only() {
    let mut stage = Stage::new(true);
    for _ in 0..2 {
        let socket = stage.line().await;
        socket.send(&[0xff; 3]).await.unwrap();
        let answer = receive(&socket).await;
        assert!(answer[4..].starts_with(b"failure to read message : "), "{answer:?}");
        assert_eq!(receive(&socket).await, b"");
        assert!(matches!(stage.order(Ok(())).await, Order::Lost(Loss::Fault)));
    }
}

/// An answer that comes too late would be taken for that of the next request.
#[tokio::test(start_paused = true)]
async fn order_that_takes_too_long_ends_the_connection_without_an_answer() {
    let mut stage = Stage::new(true);
    let socket = stage.line().await;
    socket.send(&SNAPSHOT_SENT).await.unwrap();
    let held = within(stage.requests.recv()).await.unwrap();
    assert_eq!(receive(&socket).await, b"");
    let lost = within(stage.requests.recv()).await.unwrap();
    assert!(matches!(lost.order, Order::Lost(Loss::TooSlow)));
    drop((held, lost));
}

#[tokio::test]
async fn it_ends_with_whoever_takes_its_orders() {
    let stage = Stage::new(true);
    let Stage { requests, client, .. } = stage;
    drop(requests);
    within(client).await.unwrap();
    let waiting = Stage::new(false);
    drop(waiting.requests);
    within(waiting.client).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn pauses_between_attempts_grow_from_20_ms_to_15_s() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody.sock");
    let (orders, mut requests) = mpsc::channel(1);
    tokio::spawn(async move { run(&path, std::future::ready(()), orders).await });
    let mut last = None;
    let mut pauses = Vec::new();
    for _ in 0..13 {
        let request = requests.recv().await.unwrap();
        assert!(matches!(request.order, Order::Lost(Loss::Unreachable)));
        let now = tokio::time::Instant::now();
        pauses.extend(last.map(|last| now.duration_since(last).as_millis()));
        last = Some(now);
        request.answer.send(Ok(())).unwrap();
    }
    assert_eq!(pauses[..4], [20, 40, 80, 160]);
    assert_eq!(pauses[10..], [15_000, 15_000]);
}
