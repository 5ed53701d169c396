#![allow(clippy::unwrap_used)]

use super::*;
use crate::file::Mesh;

const POD: NetnsCookie = NetnsCookie(7);

fn key(port: u16) -> VerdictKey {
    VerdictKey { source: POD, destination: SocketAddr::from(([10, 1, 0, 7], port)) }
}

fn insert(table: &mut Table, port: u16, used: u64) -> VerdictId {
    let mesh = Mesh::parse(include_bytes!("../../file/tests/example.yaml")).unwrap();
    let id = table.next_id();
    table.insert(Grant {
        id,
        key: key(port),
        source: Arc::new(mesh.workloads.values().next().unwrap().clone()),
        source_pod: LocalPod { uid: "a".into(), netns: POD },
        verdict: Verdict { backends: Vec::new(), elsewhere: 0, service: None },
        pods: Vec::new(),
        lacking: None,
        expires: Duration::from_secs(1000),
        used: AtomicU64::new(used),
    });
    id
}

#[test]
fn verdicts_are_found_by_number_for_a_while_after_they_were_taken_back() {
    let mut table = Table::new(10, 100);
    let id = insert(&mut table, 80, 0);
    assert!(id > VerdictId(100));
    table.remove(&key(80));
    assert!(table.get(&key(80)).is_none());
    assert_eq!((table.len(), table.count_of(POD)), (0, 0));
    assert!(table.find(id).is_some());
    for _ in 0..RETIRED {
        insert(&mut table, 80, 0);
    }
    assert!(table.find(id).is_some());
    insert(&mut table, 80, 0);
    assert!(table.find(id).is_none());
    assert_eq!((table.len(), table.count_of(POD)), (1, 1));
}

#[test]
fn what_is_replaced_under_its_own_number_stays() {
    let mut table = Table::new(10, 100);
    let id = insert(&mut table, 80, 0);
    table.next = id.0 - 1;
    assert_eq!(insert(&mut table, 80, 5), id);
    assert!(table.retired.is_empty());
    assert_eq!(table.find(id).unwrap().used.load(Ordering::Relaxed), 5);
}

#[test]
fn a_pod_has_room_for_so_many_verdicts_and_gives_up_the_longest_unused() {
    let now = Duration::from_secs(1000);
    let mut table = Table::new(2, 100);
    insert(&mut table, 80, 900);
    assert_eq!(table.room(POD, now), Room::Free);
    insert(&mut table, 81, 800);
    assert_eq!(table.room(POD, now), Room::Instead(key(81)));
    assert_eq!(table.room(NetnsCookie(8), now), Room::Free);
    table.get(&key(81)).unwrap().touch(now);
    table.get(&key(80)).unwrap().touch(now);
    assert_eq!(table.room(POD, now), Room::None);
}
