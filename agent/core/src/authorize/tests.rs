#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::authorization::PolicyScope;
use crate::fixtures::*;
use crate::snapshot::Change;

const FRONT: &str = "cluster.local/ns/web/sa/front";
const ALLOW: Action = Action::Allow;
const DENY: Action = Action::Deny;

fn local() -> Workload {
    pod("shop", "api", &["10.1.0.7"])
}

fn naming(policies: &[&str]) -> Workload {
    let authorization_policies = policies.iter().map(|key| (*key).into()).collect();
    Workload { authorization_policies, ..local() }
}

fn scoped(scope: PolicyScope, policy: Authorization) -> Authorization {
    Authorization { scope, ..policy }
}

fn dry(policy: Authorization) -> Authorization {
    Authorization { dry_run: true, ..policy }
}

fn with(policies: &[Authorization]) -> Snapshot {
    Snapshot::default().with(policies.iter().cloned().map(Change::Authorization))
}

/// `+` for permitted, `-` for denied, for the authenticated client and the plaintext one.
fn verdicts(local: &Workload, policies: &[Authorization]) -> String {
    let snapshot = with(policies);
    [authenticated(FRONT), plaintext()]
        .iter()
        .map(|connection| match authorize(&snapshot, local, connection).verdict {
            Ok(_) => '+',
            Err(_) => '-',
        })
        .collect()
}

#[test]
fn sets_of_policies_decide_as_the_vectors_say() {
    let namespace = PolicyScope::Namespace;
    let selector = PolicyScope::WorkloadSelector;
    let nothing = || policy("shop", "nothing", ALLOW, &[]);
    let web = || policy("shop", "web", ALLOW, &["N=web"]);
    let authenticated_only = || policy("shop", "mtls", DENY, &["!P?"]);
    let strict = policy("istio-system", "istio_converted_static_strict", DENY, &["!P?"]);
    let of_other = policy("other", "p", DENY, &["PORT=8080"]);
    let front = policy("a", "front", ALLOW, &[&format!("P={FRONT}")]);
    let named = naming(&["shop/nothing"]);
    let missing = naming(&["shop/missing"]);
    let vectors = [
        ("V1", local(), vec![], "++"),
        ("V2", local(), vec![scoped(namespace, nothing())], "--"),
        ("V3", local(), vec![scoped(namespace, policy("other", "p", ALLOW, &[]))], "++"),
        ("V4", local(), vec![web()], "+-"),
        ("V5", local(), vec![policy("shop", "p", DENY, &[])], "++"),
        ("V6", local(), vec![policy("shop", "p", DENY, &[""])], "--"),
        ("V7", local(), vec![web(), policy("shop", "p", DENY, &["PORT=8080"])], "--"),
        ("V8", local(), vec![policy("shop", "p", ALLOW, &["N=x"]), web()], "+-"),
        ("V9", local(), vec![scoped(selector, nothing())], "++"),
        ("V10", named, vec![scoped(selector, nothing())], "--"),
        ("V11", missing.clone(), vec![], "++"),
        ("V12", missing, vec![authenticated_only()], "+-"),
        (
            "V13",
            naming(&["istio-system/istio_converted_static_strict"]),
            vec![scoped(selector, strict)],
            "+-",
        ),
        ("V14", local(), vec![dry(policy("shop", "p", DENY, &[""]))], "++"),
        ("V15", local(), vec![dry(nothing())], "++"),
        ("V16", local(), vec![dry(policy("shop", "p", ALLOW, &["N=x"])), web()], "+-"),
        ("V17", local(), vec![dry(web()), policy("shop", "p", ALLOW, &["N=x"])], "--"),
        ("V18", local(), vec![front, scoped(namespace, nothing())], "+-"),
        ("V19", naming(&["other/p"]), vec![scoped(namespace, of_other)], "--"),
        ("V21", local(), vec![policy("shop", "p", ALLOW, &["PORT=80"])], "--"),
        ("V22", local(), vec![policy("shop", "p", ALLOW, &["PORT=8080"])], "++"),
        ("V23", local(), vec![policy("shop", "p", DENY, &["DIP=10.1.0.8/32"])], "++"),
    ];
    for (number, local, policies, expected) in vectors {
        assert_eq!(verdicts(&local, &policies), expected, "{number}");
    }
}

#[test]
fn behind_a_waypoint_its_own_address_is_the_source() {
    let snapshot = with(&[policy("shop", "v20", ALLOW, &["SIP=10.2.0.3/32"])]);
    let direct = authenticated(FRONT);
    let through = Connection { source: "10.3.0.1".parse().unwrap(), ..direct.clone() };
    assert!(authorize(&snapshot, &local(), &direct).verdict.is_ok());
    assert_eq!(authorize(&snapshot, &local(), &through).verdict, Err(Denied::NoneAllowed));
}

#[test]
fn a_verdict_names_its_policy_and_rule() {
    let deny = policy("shop", "no-front", DENY, &["N=x", "SA=web/front"]);
    let allow = policy("shop", "all", ALLOW, &[""]);
    let snapshot = with(&[deny, allow]);
    let denied = authorize(&snapshot, &local(), &authenticated(FRONT)).verdict.unwrap_err();
    assert_eq!(denied.to_string(), "explicitly denied by: shop/no-front");
    assert_eq!((denied.policy(), denied.rule()), (Some(&"shop/no-front".into()), Some(1)));
    let permit = authorize(&snapshot, &local(), &plaintext()).verdict.unwrap();
    assert_eq!((permit.policy(), permit.rule()), (Some(&"shop/all".into()), Some(0)));
    assert_eq!(Denied::NoneAllowed.to_string(), "allow policies exist, but none allowed");
}

#[test]
fn missing_policies_are_reported() {
    let judgement = authorize(&with(&[]), &naming(&["shop/missing", "shop/gone"]), &plaintext());
    assert_eq!(judgement.missing, ["shop/missing".into(), "shop/gone".into()]);
    assert!(judgement.verdict.is_ok());
}

#[test]
fn dry_run_policies_are_reported_only() {
    let judge = |policies: &[Authorization]| {
        authorize(&with(policies), &local(), &authenticated(FRONT)).dry_run
    };
    let deny = dry(policy("shop", "d", DENY, &[""]));
    let hit = dry(policy("shop", "h", ALLOW, &["N=web"]));
    let miss = dry(policy("shop", "m", ALLOW, &["N=x"]));
    let enforced = policy("shop", "e", ALLOW, &["N=web"]);
    let would_deny = || DryRun::WouldDeny { policy: "shop/d".into(), rule: 0 };
    let would_allow = || DryRun::WouldAllow { policy: "shop/h".into(), rule: 0 };
    let would_not = DryRun::WouldNotAllow { policies: vec!["shop/m".into()] };
    assert_eq!(judge(std::slice::from_ref(&deny)), [would_deny()]);
    assert_eq!(judge(&[deny, hit.clone()]), [would_deny(), would_allow()]);
    assert_eq!(judge(std::slice::from_ref(&miss)), [would_not]);
    assert_eq!(judge(&[miss.clone(), hit]), [would_allow()]);
    assert_eq!(judge(&[miss, enforced]), []);
}

#[test]
fn a_policy_that_applies_twice_is_evaluated_once() {
    let everywhere = dry(policy("shop", "p", DENY, &[""]));
    let judgement = authorize(&with(&[everywhere]), &naming(&["shop/p"]), &plaintext());
    assert_eq!(judgement.dry_run.len(), 1);
}

mod waypoints {
    use super::*;
    use crate::service::Service;

    const WAYPOINT: &str = "cluster.local/ns/shop/sa/wp";

    fn bound() -> Workload {
        Workload { waypoint: Some(by_hostname("shop/waypoint.shop")), ..local() }
    }

    fn mesh(workload: Workload, require: RequireWaypoint) -> Snapshot {
        let waypoint = pod("shop", "wp", &["10.1.0.20"]).behind("shop/waypoint.shop", &[]);
        snapshot([workload, waypoint], [service("shop", "waypoint", &[], &[(15008, 15008)])])
            .with([Change::RequireWaypoint(require)])
    }

    fn judge(snapshot: &Snapshot, connection: &Connection) -> Result<(), Denied> {
        let local = snapshot.workload("c1//Pod/shop/api").unwrap();
        authorize(snapshot, local, connection).verdict.map(|_| ())
    }

    fn refused(by: &str) -> Result<(), Denied> {
        Err(Denied::NotFromWaypoint { waypoint: by.to_owned() })
    }

    #[test]
    fn only_a_demand_makes_the_binding_count() {
        let uid = |uid: &str| RequireWaypoint::Workloads(vec![uid.into()]);
        let away = refused("shop/waypoint.shop");
        let cases = [
            (RequireWaypoint::Nobody, Ok(())),
            (RequireWaypoint::EveryBound, away.clone()),
            (uid("c1//Pod/shop/api"), away),
            (uid("c1//Pod/shop/other"), Ok(())),
        ];
        for (require, expected) in cases {
            let snapshot = mesh(bound(), require);
            assert_eq!(judge(&snapshot, &authenticated(FRONT)), expected);
            assert_eq!(judge(&snapshot, &plaintext()), expected);
            assert_eq!(judge(&snapshot, &authenticated(WAYPOINT)), Ok(()));
        }
    }

    #[test]
    fn unbound_workloads_are_reached_by_anyone() {
        let snapshot = mesh(local(), RequireWaypoint::EveryBound);
        assert_eq!(judge(&snapshot, &authenticated(FRONT)), Ok(()));
    }

    #[test]
    fn a_waypoint_of_any_of_its_services_binds() {
        let via_service = service("shop", "api", &[], &[(80, 8080)]);
        let via_service =
            Service { waypoint: Some(by_hostname("shop/waypoint.shop")), ..via_service };
        let endpoint = local().behind("shop/api.shop", &[]);
        let snapshot =
            mesh(endpoint, RequireWaypoint::EveryBound).with([Change::service(via_service)]);
        assert_eq!(judge(&snapshot, &authenticated(FRONT)), refused("shop/waypoint.shop"));
        assert_eq!(judge(&snapshot, &authenticated(WAYPOINT)), Ok(()));
    }

    #[test]
    fn the_names_of_the_waypoint_service_count_as_its_identities() {
        let named = Service {
            subject_alt_names: vec!["nonsense".into(), "spiffe://td/ns/far/sa/wp".into()],
            ..service("shop", "waypoint", &[], &[])
        };
        let snapshot = mesh(bound(), RequireWaypoint::EveryBound).with([Change::service(named)]);
        assert_eq!(judge(&snapshot, &authenticated("td/ns/far/sa/wp")), Ok(()));
    }

    #[test]
    fn an_unknown_waypoint_lets_nobody_in_unless_another_one_does() {
        let lost = Workload { waypoint: Some(by_hostname("shop/lost.shop")), ..local() };
        let snapshot = mesh(lost.clone(), RequireWaypoint::EveryBound);
        assert_eq!(judge(&snapshot, &authenticated(WAYPOINT)), refused("shop/lost.shop"));

        let via_service = Service {
            waypoint: Some(by_hostname("shop/waypoint.shop")),
            ..service("shop", "api", &[], &[])
        };
        let snapshot = mesh(lost.behind("shop/api.shop", &[]), RequireWaypoint::EveryBound)
            .with([Change::service(via_service)]);
        assert_eq!(judge(&snapshot, &authenticated(WAYPOINT)), Ok(()));
        let both = refused("shop/lost.shop, shop/waypoint.shop");
        assert_eq!(judge(&snapshot, &authenticated(FRONT)), both);
    }

    #[test]
    fn a_waypoint_is_not_bound_to_itself() {
        let itself = bound().behind("shop/waypoint.shop", &[]);
        let snapshot = mesh(itself, RequireWaypoint::EveryBound);
        assert_eq!(judge(&snapshot, &authenticated(FRONT)), Ok(()));
    }

    #[test]
    fn a_permitting_waypoint_does_not_override_policies() {
        let snapshot = mesh(bound(), RequireWaypoint::EveryBound)
            .with([Change::Authorization(policy("shop", "p", DENY, &["PORT=8080"]))]);
        let denied = judge(&snapshot, &authenticated(WAYPOINT)).unwrap_err();
        assert_eq!(denied.policy(), Some(&"shop/p".into()));
    }

    #[test]
    fn rejudging_is_asked_for_when_it_may_matter() {
        let uid = "c1//Pod/shop/api";
        let before = mesh(bound(), RequireWaypoint::EveryBound);
        let alike = |changes: Vec<Change>| judges_alike(&before, &before.with(changes), uid);
        let other_waypoint = pod("shop", "wp2", &[]).behind("shop/waypoint.shop", &[]);
        assert!(alike(vec![]));
        assert!(alike(vec![Change::workload(pod("web", "front", &["10.2.0.3"]))]));
        assert!(alike(vec![Change::workload(bound())]));
        assert!(!alike(vec![Change::workload(other_waypoint)]));
        assert!(!alike(vec![Change::RemoveWorkload("c1//Pod/shop/wp".into())]));
        assert!(!alike(vec![Change::RequireWaypoint(RequireWaypoint::Nobody)]));
        assert!(!alike(vec![Change::Authorization(policy("x", "p", DENY, &[]))]));
        assert!(!alike(vec![Change::workload(naming(&["shop/p"]))]));
        assert!(!alike(vec![Change::RemoveWorkload(uid.into())]));
    }
}

fn any_policy() -> impl Strategy<Value = Authorization> {
    let rules = prop::sample::subsequence(
        vec![
            "",
            "{}",
            "N=web",
            "N=shop",
            "P?",
            "!P?",
            "PORT=8080",
            "!PORT=8080 N=web",
            "SIP=10.0.0.0/8",
        ],
        0..3,
    );
    let scope = prop::sample::select(vec![
        PolicyScope::Global,
        PolicyScope::Namespace,
        PolicyScope::WorkloadSelector,
    ]);
    let namespace = prop::sample::select(vec!["shop", "other"]);
    (0..8u8, namespace, scope, any::<bool>(), prop::bool::weighted(0.2), rules).prop_map(
        |(name, namespace, scope, deny, dry_run, rules)| {
            let action = if deny { DENY } else { ALLOW };
            let policy = policy(namespace, &format!("p{name}"), action, &rules);
            Authorization { scope, dry_run, ..policy }
        },
    )
}

fn any_connection() -> impl Strategy<Value = Connection> {
    let client = prop::sample::select(vec![
        plaintext(),
        authenticated(FRONT),
        authenticated("cluster.local/ns/shop/sa/api"),
    ]);
    let port = prop::sample::select(vec![8080, 9090]);
    (client, port).prop_map(|(connection, port)| Connection { port, ..connection })
}

fn permits(policies: &[Authorization], connection: &Connection) -> bool {
    let local = naming(&["shop/p0", "other/p1"]);
    authorize(&with(policies), &local, connection).verdict.is_ok()
}

proptest! {
    #[test]
    fn adding_a_deny_policy_never_permits_more(
        policies in prop::collection::vec(any_policy(), 0..6),
        added in any_policy(),
        connection in any_connection(),
    ) {
        let added = Authorization { action: DENY, name: "added".into(), ..added };
        let mut more = policies.clone();
        more.push(added);
        prop_assert!(permits(&policies, &connection) || !permits(&more, &connection));
    }

    #[test]
    fn removing_one_of_several_allow_policies_never_permits_more(
        policies in prop::collection::vec(any_policy(), 0..6),
        connection in any_connection(),
    ) {
        // The one that stays keeps the implicit deny in force.
        let mut fewer = policies;
        fewer.push(policy("shop", "stays", ALLOW, &[]));
        let mut all = fewer.clone();
        all.push(policy("shop", "removed", ALLOW, &["N=web", "!P?"]));
        prop_assert!(permits(&all, &connection) || !permits(&fewer, &connection));
    }

    #[test]
    fn dry_run_policies_never_change_a_verdict(
        policies in prop::collection::vec(any_policy(), 0..6),
        added in any_policy(),
        connection in any_connection(),
    ) {
        let mut more = policies.clone();
        more.push(Authorization { dry_run: true, name: "added".into(), ..added });
        prop_assert_eq!(permits(&policies, &connection), permits(&more, &connection));
    }

    #[test]
    fn a_permit_needs_no_policy_or_a_matching_one(
        policies in prop::collection::vec(any_policy(), 0..6),
        connection in any_connection(),
    ) {
        let snapshot = with(&policies);
        if let Ok(permit) = authorize(&snapshot, &local(), &connection).verdict
            && let Some(key) = permit.policy()
        {
            let policy = snapshot.policy(key).unwrap();
            prop_assert_eq!(policy.action, ALLOW);
            prop_assert!(!policy.dry_run);
            prop_assert_eq!(policy.matching_rule(&connection), permit.rule());
        }
    }
}
